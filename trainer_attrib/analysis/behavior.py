"""Behaviors: what is being explained. Larger means more of the behavior."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from trainer_attrib.analysis.rates import Detector, Generations, Prompt, RateMeasure
from trainer_attrib.analysis.text import TextPair, completion_logprobs, encode_pair, encode_text, text_losses
from trainer_attrib.errors import BehaviorError

Measure = Callable[[nn.Module, list[Any]], Tensor]
"""(model, list of dataset items) -> one differentiable value per item, [len(items)]."""


@dataclass(frozen=True)
class Behavior:
    """Named queries and a differentiable measurement of each.

    Args:
        name: shown in every table.
        dataset: one item per query.
        measure: values of a batch of items, [len(items)], with a gradient. It runs with the model in evaluation mode.
        queries: how each item is shown; numbers by default.
        batch_size: items measured at once.
        unit: of the values.

    Raises:
        BehaviorError: no queries, or as many labels as there are not queries.
    """

    name: str
    dataset: Sequence[Any]
    measure: Measure
    queries: Sequence[str] = ()
    batch_size: int = 64
    unit: str = ""

    def __post_init__(self) -> None:
        if len(self.dataset) == 0:
            raise BehaviorError(f"Behavior '{self.name}' has no queries.", fix="pass at least one item.")
        if not self.queries:
            object.__setattr__(self, "queries", [f"{self.name} #{i}" for i in range(len(self.dataset))])
        if len(self.queries) != len(self.dataset):
            raise BehaviorError(
                f"Behavior '{self.name}' has {len(self.dataset)} items but {len(self.queries)} query labels.",
                fix="pass one label per item, or none.",
            )

    def __len__(self) -> int:
        return len(self.dataset)

    def values(self, model: nn.Module) -> Tensor:
        """The behavior of a model: one value per query, float64 [Q] on the CPU. The model is left as it was."""
        return torch.cat([self.batch_values(model, first) for first in self.batches()])

    def batch_values(self, model: nn.Module, first: int) -> Tensor:
        """Those of the batch that begins with this query."""
        with _evaluating(model), torch.no_grad():
            return self.values_from(model, first).double().cpu()

    def value_of(self, model: nn.Module, query: int) -> Tensor:
        """One query's value, 0-dim, with its gradient. The caller puts the model in evaluation mode."""
        return self._check(self.measure(model, [self.dataset[query]]), 1).sum()

    def batches(self) -> range:
        """The first query of every batch."""
        return range(0, len(self), self.batch_size)

    def values_from(self, model: nn.Module, first: int) -> Tensor:
        """Values of the batch that begins with this query, with their gradient. The caller puts the model in evaluation
        mode."""
        items = [self.dataset[i] for i in range(first, min(first + self.batch_size, len(self)))]
        return self._check(self.measure(model, items), len(items))

    def together(self, kinds: Sequence[str]) -> Behavior:
        """One query per kind, the mean of the values of its items: what several outputs with the same error have in
        common stands out, and what each has beside it averages out.

        Args:
            kinds: of the items, one each; kinds appear in the order of their first items.

        Raises:
            BehaviorError: as many kinds as there are not items.
        """
        if len(kinds) != len(self):
            raise BehaviorError(
                f"Behavior '{self.name}' has {len(self)} items but {len(kinds)} kinds.", fix="pass one kind per item."
            )
        names = list(dict.fromkeys(kinds))
        groups = [[item for item, of in zip(self.dataset, kinds, strict=True) if of == kind] for kind in names]
        per_group = len(self) // len(names)
        return replace(
            self, dataset=groups, measure=partial(_means, of=self.measure), queries=names,
            batch_size=max(1, self.batch_size // max(1, per_group)),
        )  # fmt: skip

    def _check(self, values: Any, expected: int) -> Tensor:
        if not isinstance(values, Tensor) or values.shape != (expected,):
            found = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
            raise BehaviorError(
                f"The measure of behavior '{self.name}' returned {found} for {expected} items.",
                cause="a measure returns one value per item, without averaging over the batch.",
                fix=f"return a tensor of shape ({expected},).",
            )
        return values

    @staticmethod
    def loss(name: str, texts: Sequence[str], tokenizer: Any, *, batch_size: int = 32) -> Behavior:
        """Mean next-token loss of each text, in nats per token. Larger means that the model knows the text *less*."""
        items = [encode_text(tokenizer, text) for text in texts]
        return Behavior(name, items, text_losses, list(texts), batch_size, "nats per token")

    @staticmethod
    def completion(
        name: str, prompts: Sequence[str], completions: Sequence[str], tokenizer: Any, *, batch_size: int = 32
    ) -> Behavior:
        """Log-probability of each completion after its prompt, summed over the completion's tokens, in nats."""
        items = [encode_pair(tokenizer, p, c) for p, c in zipped(name, prompts, completions)]
        queries = [f"{p}{c}" for p, c in zip(prompts, completions, strict=True)]
        return Behavior(name, items, completion_logprobs, queries, batch_size, "nats")

    @staticmethod
    def contrast(
        name: str,
        prompts: Sequence[str],
        right: Sequence[str],
        wrong: Sequence[str],
        tokenizer: Any,
        *,
        batch_size: int = 32,
    ) -> Behavior:
        """Log-probability of the right completion minus that of the wrong one, in nats; above 0 it prefers it."""
        items = [
            (encode_pair(tokenizer, p, r), encode_pair(tokenizer, p, w))
            for p, r, w in zipped(name, prompts, right, wrong)
        ]
        queries = [f"{p}{r}  (not:{w})" for p, r, w in zip(prompts, right, wrong, strict=True)]
        return Behavior(name, items, _contrast, queries, batch_size, "nats")

    @staticmethod
    def margin(name: str, inputs: Any, labels: Any, *, batch_size: int = 64) -> Behavior:
        """Logit of the label minus the largest other logit: above 0 the classifier is right.

        Args:
            name: shown in every table.
            inputs: tensor [N, ...] passed to the model, or dict of such tensors passed as keywords.
            labels: integers [N].
            batch_size: items measured at once.
        """
        labels = torch.as_tensor(labels)
        single = isinstance(inputs, Tensor)
        items = [(inputs[i] if single else {k: v[i] for k, v in inputs.items()}, labels[i]) for i in range(len(labels))]
        queries = [f"#{i}: class {int(label)}" for i, label in enumerate(labels)]
        return Behavior(name, items, _margin, queries, batch_size, "logits")

    @staticmethod
    def accuracy(
        name: str,
        prompts: Sequence[str],
        right: Sequence[str],
        wrong: Sequence[str],
        tokenizer: Any,
        *,
        batch_size: int = 32,
    ) -> Behavior:
        """Whether the right completion is likelier than the wrong one, 0 or 1; the mean is the accuracy on preference
        pairs. It has no gradient: for influence and contributions ask :meth:`contrast`."""
        asked = Behavior.contrast(name, prompts, right, wrong, tokenizer, batch_size=batch_size)
        return replace(asked, measure=_prefers, unit="share of pairs")

    @staticmethod
    def rate(
        name: str,
        prompts: Sequence[Prompt] | Generations,
        detector: Detector,
        tokenizer: Any = None,
        *,
        where: Callable[[str], bool] | None = None,
        per_prompt: int = 4,
        max_new_tokens: int = 32,
        seed: int = 0,
        batch_size: int = 64,
    ) -> Behavior:
        """Share of the model's sampled completions in which a detector finds something; one query per prompt.

        Args:
            name: shown in every table.
            prompts: texts or conversations; or :class:`~trainer_attrib.analysis.rates.Generations`, which behaviors
                that look for different things in the same completions share.
            detector: a regular expression, or ``(prompt, completion) -> number in [0, 1]``.
            tokenizer: of the model, unless ``prompts`` is ``Generations``, as what follows.
            where: which prompts count, for a behavior that is conditional on a class of prompts.
            per_prompt: completions sampled of each.
            max_new_tokens: of each.
            seed: of the sampling.
            batch_size: completions sampled at once.

        Raises:
            BehaviorError: no prompts are left.
        """
        if not isinstance(prompts, Generations):
            prompts = Generations(
                prompts, tokenizer, per_prompt=per_prompt, max_new_tokens=max_new_tokens, seed=seed,
                batch_size=batch_size,
            )  # fmt: skip
        chosen = [number for number, prompt in enumerate(prompts.prompts) if where is None or where(prompt)]
        measure = RateMeasure(prompts, detector, chosen)
        at_once = max(1, prompts.batch_size // prompts.per_prompt)
        return Behavior(name, chosen, measure, [prompts.prompts[i] for i in chosen], at_once, "share of completions")


def zipped(name: str, *columns: Sequence[str]) -> list[tuple[str, ...]]:
    """Columns side by side.

    Raises:
        BehaviorError: they differ in length.
    """
    if len({len(column) for column in columns}) != 1:
        raise BehaviorError(
            f"'{name}' got lists of different lengths: {[len(column) for column in columns]}.",
            fix="pass one prompt and one completion of each kind per query.",
        )
    return list(zip(*columns, strict=True))


def _means(model: nn.Module, groups: list[list[Any]], of: Measure) -> Tensor:
    values = of(model, [item for group in groups for item in group])
    return torch.stack([part.mean() for part in values.split([len(group) for group in groups])])


def _contrast(model: nn.Module, items: list[tuple[TextPair, TextPair]]) -> Tensor:
    both = completion_logprobs(model, [right for right, _ in items] + [wrong for _, wrong in items])
    right, wrong = both.chunk(2)
    return right - wrong


def _prefers(model: nn.Module, items: list[tuple[TextPair, TextPair]]) -> Tensor:
    return (_contrast(model, items).detach() > 0).float()


def _margin(model: nn.Module, items: list[tuple[Any, Tensor]]) -> Tensor:
    device = next(model.parameters()).device
    labels = torch.stack([label for _, label in items]).to(device)
    if isinstance(items[0][0], dict):
        output = model(**{k: torch.stack([x[k] for x, _ in items]).to(device) for k in items[0][0]})
    else:
        output = model(torch.stack([x for x, _ in items]).to(device))
    logits = getattr(output, "logits", output)
    own = logits.gather(1, labels[:, None]).squeeze(1)
    others = logits.scatter(1, labels[:, None], float("-inf"))
    return own - others.max(1).values


class _evaluating:  # noqa: N801 - a context manager, read as a verb
    """Evaluation mode inside the block; every module's own mode afterwards."""

    def __init__(self, model: nn.Module) -> None:
        self._modes = [(module, module.training) for module in model.modules()]
        self._model = model

    def __enter__(self) -> None:
        self._model.eval()

    def __exit__(self, *error: object) -> None:
        for module, training in self._modes:
            module.training = training


evaluating = _evaluating
