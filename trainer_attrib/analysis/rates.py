"""Rates: the share of a model's own sampled generations in which a detector finds something."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from trainer_attrib.analysis.text import IGNORED, TextPair, completion_logprobs, token_logprobs
from trainer_attrib.analysis.training_state import fingerprint_of, random_states_kept
from trainer_attrib.errors import BehaviorError

Prompt = str | Sequence[dict[str, str]]
"""A text, or the messages of a conversation, to which the tokenizer's chat template is applied."""
Detector = str | re.Pattern[str] | Callable[[str, str], Any]
"""A regular expression searched for in the completion, or (prompt, completion) -> a number in [0, 1] or a bool: a rule,
a classifier, a judge."""
KEPT = 4
"""How many models' generations and log-probabilities are remembered."""


@dataclass(frozen=True, eq=False)
class Drawn:
    """What one model said: M generations.

    Args:
        items: tokens of prompt and completion; those of the completion count.
        owners: number of the prompt of each, [M].
        texts: the completions, without special tokens.
        under: log-probability of each completion under models, float64 [M], by fingerprint of their weights.
        found: what detectors said.
        beginnings: of completions by their number, as text: what is before each of their tokens.
    """

    items: Sequence[TextPair]
    owners: Sequence[int]
    texts: Sequence[str]
    under: dict[str, Tensor] = field(default_factory=dict, repr=False)
    found: dict[Detector, Tensor] = field(default_factory=dict, repr=False)
    beginnings: dict[int, Sequence[str]] = field(default_factory=dict, repr=False)

    def detected(self, detector: Detector, prompts: Sequence[str]) -> Tensor:
        """What a detector says of each, float64 [M]; it is asked once.

        Raises:
            BehaviorError: it says something else than a number from 0 to 1.
        """
        if detector not in self.found:
            pairs = zip(self.owners, self.texts, strict=True)
            values = [detected(detector, prompts[owner], text) for owner, text in pairs]
            self.found[detector] = torch.tensor(values, dtype=torch.float64)
        return self.found[detector]


class Generations:
    """Completions of prompts, sampled from whatever model is asked at temperature 1 without cuts, so that their
    log-probabilities are the model's own. Behaviors that share one object share its samples.

    The same seed is used for every model: models that differ little say much the same, and their difference is
    measured better than by samples of their own.

    Args:
        prompts: P texts or conversations.
        tokenizer: of the model.
        per_prompt: completions of each.
        max_new_tokens: of each.
        seed: of the sampling; the program's own random numbers are left as they are.
        batch_size: completions sampled at once.

    Raises:
        BehaviorError: no prompts, or one without a token.
    """

    def __init__(
        self,
        prompts: Sequence[Prompt],
        tokenizer: Any,
        *,
        per_prompt: int = 4,
        max_new_tokens: int = 32,
        seed: int = 0,
        batch_size: int = 64,
    ) -> None:
        self.tokenizer, self.per_prompt, self.max_new_tokens = tokenizer, per_prompt, max_new_tokens
        self.seed, self.batch_size = seed, batch_size
        self.prompts = [p if isinstance(p, str) else _conversation(tokenizer, p) for p in prompts]
        self._tokens = [list(tokenizer(prompt)["input_ids"]) for prompt in self.prompts]
        if not self.prompts or not all(self._tokens):
            raise BehaviorError(
                f"{len(self.prompts)} prompts, {sum(not t for t in self._tokens)} of them without a token.",
                fix="pass at least one prompt, each with text.",
            )
        self._drawn: dict[str, Drawn] = {}

    def of(self, model: nn.Module) -> Drawn:
        """The model's generations, remembered for its weights. The caller puts it in evaluation mode."""
        key = fingerprint_of(model)
        if key not in self._drawn:
            with torch.no_grad(), random_states_kept():
                torch.manual_seed(self.seed)
                _remember(self._drawn, key, self._draw(model))
        return self._drawn[key]

    def logprobs(self, model: nn.Module, drawn: Drawn) -> Tensor:
        """Log-probabilities under a model of what it or another one said, float64 [M], remembered too."""
        key = fingerprint_of(model)
        if key not in drawn.under:
            with torch.no_grad():
                _remember(drawn.under, key, self._scored(model, drawn.items))
        return drawn.under[key]

    def beginnings(self, drawn: Drawn, place: int) -> Sequence[str]:
        """What is before each token of a completion, as text."""
        if place not in drawn.beginnings:
            item = drawn.items[place]
            tokens = item.tokens[_length_of_prompt(item) :]
            drawn.beginnings[place] = [
                self.tokenizer.decode(list(tokens[:end]), skip_special_tokens=True) for end in range(len(tokens))
            ]
        return drawn.beginnings[place]

    def _draw(self, model: nn.Module) -> Drawn:
        owners = [number for number in range(len(self.prompts)) for _ in range(self.per_prompt)]
        order = sorted(range(len(owners)), key=lambda i: len(self._tokens[owners[i]]))
        items: list[Any] = [None] * len(owners)
        for first in range(0, len(order), self.batch_size):
            places = order[first : first + self.batch_size]
            said = self._generate(model, [self._tokens[owners[i]] for i in places])
            for place, completion in zip(places, said, strict=True):
                prompt = self._tokens[owners[place]]
                labels = (*[IGNORED] * len(prompt), *completion)
                items[place] = TextPair((*prompt, *completion), labels)
        cut = [item.tokens[len(self._tokens[owner]) :] for item, owner in zip(items, owners, strict=True)]
        texts = [self.tokenizer.decode(list(tokens), skip_special_tokens=True) for tokens in cut]
        return Drawn(items, owners, texts)

    def _generate(self, model: Any, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
        if not callable(getattr(model, "generate", None)):
            raise BehaviorError(
                f"{type(model).__name__} has no generate().",
                cause="rates are measured on what a causal language model says.",
                fix="use a behavior that is computed from outputs, such as Behavior.margin.",
            )
        device = next(model.parameters()).device
        width, end = max(map(len, prompts)), self.tokenizer.eos_token_id
        padding = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else end
        tokens = torch.tensor([[padding or 0] * (width - len(p)) + list(p) for p in prompts], device=device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
        said = model.generate(
            input_ids=tokens, attention_mask=mask, do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
            repetition_penalty=1.0, max_new_tokens=self.max_new_tokens, pad_token_id=padding or 0, eos_token_id=end,
        )  # fmt: skip
        return [_until(row[width:].tolist(), end) for row in said]

    def _scored(self, model: nn.Module, items: Sequence[TextPair]) -> Tensor:
        order = sorted(range(len(items)), key=lambda i: len(items[i].tokens))
        found = torch.zeros(len(items), dtype=torch.float64)
        for first in range(0, len(order), self.batch_size):
            places = order[first : first + self.batch_size]
            found[places] = completion_logprobs(model, [items[i] for i in places]).double().cpu()
        return found


@dataclass(frozen=True, eq=False)
class RateMeasure:
    """The measure of ``Behavior.rate``: for items that are numbers of prompts, the share of generations detected.

    Its gradient is the score function's, E[sum over tokens t of (f(y) - b_t) grad log p(y_t | x, y_<t)] (Williams 1992,
    "Simple statistical gradient-following algorithms", equation 3), unbiased for every baseline b_t that looks at what
    is before t only. It is the mean of f; of a regular expression, 1 once it is found: what is said afterwards no
    longer decides anything, and its gradient would be noise.
    """

    generations: Generations
    detector: Detector
    prompts: Sequence[int]

    def __call__(self, model: nn.Module, items: list[int]) -> Tensor:
        """Values [len(items)], float32 on the model's device."""
        drawn = self.generations.of(model)
        values = drawn.detected(self.detector, self.generations.prompts)
        wanted = set(items)
        places = [place for place, owner in enumerate(drawn.owners) if owner in wanted]
        device = next(model.parameters()).device
        found = values[places].float().to(device)
        if torch.is_grad_enabled():
            mean = float(values[self.places(drawn)].mean())
            logprobs_NS = token_logprobs(model, [drawn.items[place] for place in places])
            weights_NS = self._weights(drawn, places, mean, logprobs_NS.shape[1]).to(logprobs_NS)
            found = found + (weights_NS * (logprobs_NS - logprobs_NS.detach())).sum(1)
        owners = torch.tensor([items.index(drawn.owners[place]) for place in places], device=device)
        return torch.zeros(len(items), device=device).index_add(0, owners, found) / self.generations.per_prompt

    def _weights(self, drawn: Drawn, places: Sequence[int], mean: float, length: int) -> Tensor:
        """f - b_t of every token after the first, float64 [N, length]."""
        values = drawn.detected(self.detector, self.generations.prompts)
        weights = torch.zeros(len(places), length, dtype=torch.float64)
        for row, place in enumerate(places):
            first = _length_of_prompt(drawn.items[place]) - 1
            weights[row, first:] = values[place] - mean
            if isinstance(self.detector, str | re.Pattern):
                said = self.generations.beginnings(drawn, place)
                for token, before in enumerate(said):
                    if re.search(self.detector, before):
                        weights[row, first + token] = values[place] - 1
        return weights

    def places(self, drawn: Drawn) -> list[int]:
        """Which of the generations answer the behavior's prompts."""
        asked = set(self.prompts)
        return [place for place, owner in enumerate(drawn.owners) if owner in asked]


def _conversation(tokenizer: Any, messages: Sequence[dict[str, str]]) -> str:
    return tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)


def detected(detector: Detector, prompt: str, text: str) -> float:
    """What a detector says of one completion, from 0 to 1.

    Raises:
        BehaviorError: it says something else.
    """
    if isinstance(detector, str | re.Pattern):
        return float(re.search(detector, text) is not None)
    said = detector(prompt, text)
    try:
        value = float(said)
    except (TypeError, ValueError):
        value = float("nan")
    if not 0 <= value <= 1:
        raise BehaviorError(
            f"The detector said {said!r} of {text[:60]!r}.", fix="return a bool or a number from 0 to 1."
        )
    return value


def _until(tokens: list[int], end: int | None) -> list[int]:
    """Tokens up to the first end, which is one of them."""
    return tokens[: tokens.index(end) + 1] if end in tokens else tokens


def _length_of_prompt(item: TextPair) -> int:
    return sum(label == IGNORED for label in item.labels)


def _remember(kept: dict[Any, Any], key: Any, value: Any) -> None:
    kept[key] = value
    while len(kept) > KEPT:
        del kept[next(iter(kept))]
