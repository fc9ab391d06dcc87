"""Behaviors that increase with an error: what to ask when a model says something wrong.

How a query is made decides more than how it is scored. Most tokens of a wrong output are format, copied, or right; a
contrast with the corrected output cancels them. Where nobody knows the correction, the model before the stage tells
which tokens the stage taught, or what it would have said instead, or examples tell what all outputs have in common.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from trainer_attrib.analysis.behavior import Behavior, evaluating, zipped
from trainer_attrib.analysis.effects.lineage import Lineage
from trainer_attrib.analysis.query_sketches import sketch_queries
from trainer_attrib.analysis.text import TextPair, completion_logprobs, next_token_logits
from trainer_attrib.analysis.training_state import standing
from trainer_attrib.errors import ConfigurationError
from trainer_attrib.ledger.reader import StageReader

FORMS = ("contrast", "learned", "alternative", "background", "plain")
CONCENTRATED = 0.4
"""Share of the weight on a query's two heaviest tokens above which 'learned' was measured to help much; below, the base
model does not speak the format yet, and weights are on everything."""
RIDGE = 1e-3
"""Of the mean squared length, so that alike background gradients do not get opposite, large coefficients."""


@dataclass(frozen=True)
class ErrorQueries:
    """Wrong outputs and what they are held against.

    Args:
        name: shown in every table.
        prompts: one per query.
        wrong: what the model said.
        right: what it should have said, if that is known.
        background: (prompt, completion) of other, mostly right outputs of the same kind, for form 'background'.

    Raises:
        BehaviorError: lists of different lengths, or nothing to measure.
    """

    name: str
    prompts: Sequence[str]
    wrong: Sequence[str]
    right: Sequence[str] = ()
    background: Sequence[tuple[str, str]] = ()

    def __post_init__(self) -> None:
        zipped(self.name, self.prompts, self.wrong, self.right or self.wrong)

    def behavior(self, lineage: Lineage, stage: StageReader, tokenizer: Any, form: str = "auto") -> Behavior:
        """The behavior, in nats; see :meth:`trainer_attrib.Analyzer.error_behavior`."""
        if form not in ("auto", *FORMS):
            raise ConfigurationError(f"Unknown form {form!r}.", fix=f"use 'auto' or one of {FORMS}.")
        if form == "contrast" or (form == "auto" and self.right):
            if not self.right:
                raise ConfigurationError("A contrast needs the right outputs.", fix="pass right=[...], or form='auto'.")
            return Behavior.contrast(self.name, self.prompts, self.wrong, self.right, tokenizer)
        plain = Behavior.completion(self.name, self.prompts, self.wrong, tokenizer)
        if form == "plain":
            return plain
        if form == "background" or (
            form == "auto" and self.background and not self._concentrated(lineage, stage, plain)
        ):
            return self._projected(lineage, stage, tokenizer, plain)
        items = _learned(lineage, stage, plain.dataset, alternatives=form == "alternative")
        return Behavior(self.name, items, _weighted, self._labels(items), plain.batch_size, "nats")

    def _concentrated(self, lineage: Lineage, stage: StageReader, plain: Behavior) -> bool:
        shares = [sum(sorted(item.weights)[-2:]) for item in _learned(lineage, stage, plain.dataset)]
        return sum(shares) / len(shares) > CONCENTRATED

    def _labels(self, items: Sequence[WeightedTokens]) -> list[str]:
        told = [f"{p}{w}" for p, w in zip(self.prompts, self.wrong, strict=True)]
        return [
            f"{t}  (the stage did not make it likelier)" if i.untaught else t for t, i in zip(told, items, strict=True)
        ]

    def _projected(self, lineage: Lineage, stage: StageReader, tokenizer: Any, plain: Behavior) -> Behavior:
        """Each query minus that combination of background outputs whose gradient is closest to its own, in the rows'
        scaling: what is left is what the query has and they have not."""
        if not self.background:
            raise ConfigurationError(
                "Form 'background' needs other outputs of the same kind.",
                fix="pass background=[(prompt, completion), ...], some 50 training examples drawn at random.",
            )
        prompts, completions = zip(*self.background, strict=True)
        others = Behavior.completion(self.name, prompts, completions, tokenizer)
        version = max((entry["version"] for entry in stage.meta["versions"]), default=0)
        sketches = sketch_queries(lineage.model, stage, version, [plain, others]).double()
        queries_QK, others_BK = sketches[: len(plain)], sketches[len(plain) :]
        gram_BB = others_BK @ others_BK.T
        gram_BB += RIDGE * gram_BB.diagonal().mean() * torch.eye(len(gram_BB)).double()
        parts_QB = torch.linalg.solve(gram_BB, others_BK @ queries_QK.T).T
        items = list(zip(plain.dataset, parts_QB, strict=True))
        measure = partial(_without, others=list(others.dataset))
        return Behavior(self.name, items, measure, list(plain.queries), plain.batch_size, "nats")


@dataclass(frozen=True)
class WeightedTokens:
    """An output whose tokens count by how much the stage taught them.

    Args:
        pair: the tokens.
        weights: of each token, 0 where it does not count; they sum to 1.
        instead: tokens to hold against them; None for none.
        untaught: the stage made none likelier, so that all count alike.
    """

    pair: TextPair
    weights: tuple[float, ...]
    instead: tuple[int, ...] | None = None
    untaught: bool = False


def _learned(
    lineage: Lineage, stage: StageReader, pairs: Sequence[TextPair], *, alternatives: bool = False
) -> list[WeightedTokens]:
    """Weights relu(log p now - log p at the stage's start) of every token, scaled to sum to 1, and what the model would
    have preferred then."""
    now = [_told(lineage.model, pair) for pair in pairs]
    with standing(lineage.model, lineage.start(stage)):
        before = [_told(lineage.model, pair) for pair in pairs]
    found = []
    for pair, (own_S, _), (own_before_S, others_S) in zip(pairs, now, before, strict=True):
        gains_S = (own_S - own_before_S).clamp_min(0)
        untaught = not bool(gains_S.any())
        counted_S = torch.tensor([label >= 0 for label in pair.labels[1:]]).double()
        weights_S = (counted_S if untaught else gains_S) / (counted_S if untaught else gains_S).sum()
        instead = (0, *others_S.tolist()) if alternatives else None
        found.append(WeightedTokens(pair, (0.0, *weights_S.tolist()), instead, untaught))
    return found


def _told(model: nn.Module, pair: TextPair) -> tuple[Tensor, Tensor]:
    """Log-probability of each token after the first, 0 where it does not count, and the likeliest other token there."""
    with evaluating(model), torch.no_grad():
        logits, labels = next_token_logits(model, [pair])
    logprobs, labels = logits[0].double().log_softmax(-1), labels[0]
    counted = labels >= 0
    own = torch.where(counted, logprobs.gather(1, labels.clamp_min(0)[:, None])[:, 0], 0.0)
    others = logprobs.scatter(1, labels.clamp_min(0)[:, None], float("-inf")).argmax(1)
    return own.cpu(), others.cpu()


def _weighted(model: nn.Module, items: list[WeightedTokens]) -> Tensor:
    """Weighted log-probabilities of the tokens, minus those of the alternatives, [N]."""
    logits, labels = next_token_logits(model, [item.pair for item in items])
    logprobs = logits.log_softmax(-1)
    width = labels.shape[1] + 1
    weights = torch.tensor([i.weights + (0.0,) * (width - len(i.weights)) for i in items]).to(logprobs)[:, 1:]
    values = logprobs.gather(2, labels.clamp_min(0)[..., None])[..., 0]
    if all(item.instead is not None for item in items):
        rows = [(i.instead or ()) + (0,) * (width - len(i.weights)) for i in items]
        instead = torch.tensor(rows, device=labels.device)[:, 1:]
        values = values - logprobs.gather(2, instead[..., None])[..., 0]
    return (weights * values).sum(1)


def _without(model: nn.Module, items: list[tuple[TextPair, Tensor]], others: list[TextPair]) -> Tensor:
    own = completion_logprobs(model, [pair for pair, _ in items])
    parts = torch.stack([parts for _, parts in items]).to(own)
    return own - parts @ completion_logprobs(model, others)
