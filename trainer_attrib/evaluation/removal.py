"""Removal curves: what is left of a behavior when the examples that are said to support it were never trained on?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from trainer_attrib.analysis.tables import aligned
from trainer_attrib.errors import EvaluationError
from trainer_attrib.evaluation.counterfactual import Retrained
from trainer_attrib.evaluation.estimates import Estimate, finite, mean_of, same_length
from trainer_attrib.evaluation.retrieval import top

RANDOM = "random"


@dataclass(frozen=True)
class RemovalCurve:
    """Effects of each query's top k examples: behavior with them minus behavior after retraining without them.

    Attributes:
        counts: the numbers k, [K].
        queries: positions of the queries that were asked.
        effects: ranking -> float64 [K, queries], means over seeds. ``random`` is the control: the same few sets for
            every query, so that its standard error over queries is too small.
    """

    counts: tuple[int, ...]
    queries: tuple[int, ...]
    effects: dict[str, np.ndarray]

    def at(self, ranking: str, count: int) -> Estimate:
        """Mean effect over queries of a ranking's top ``count``, with its standard error over queries."""
        return mean_of(self.effects[ranking][self.counts.index(count)])

    def beyond(self, ranking: str, other: str, count: int) -> Estimate:
        """By how much a ranking's effect is larger than another's, query by query."""
        at = self.counts.index(count)
        return mean_of(self.effects[ranking][at] - self.effects[other][at])

    def __str__(self) -> str:
        rows = [(name, *(str(self.at(name, count)) for count in self.counts)) for name in self.effects]
        return aligned(("removed", *(f"top {count}" for count in self.counts)), rows)


def removal_curve(
    retrained: Retrained,
    rankings: Mapping[str, np.ndarray],
    counts: Sequence[int],
    *,
    seeds: Sequence[int] = (0,),
    queries: Sequence[int] | None = None,
    draws: int = 3,
    seed: int = 0,
) -> RemovalCurve:
    """Retrain without each query's top k examples of each ranking, and without k random ones.

    It trains up to ``len(counts) * len(seeds) * (len(rankings) * len(queries) + draws)`` models: those that the store
    does not have.

    Args:
        retrained: the store that trains and measures.
        rankings: name -> scores [Q, N], for instance our scores and those of BM25.
        counts: numbers k of examples to remove.
        seeds: of the trainings; a seed's effect is the difference of two models with that seed.
        queries: which of the Q to ask; all by default.
        draws: sets of random examples per k, the same for every query.
        seed: of the order among ties and of the random examples.

    Raises:
        EvaluationError: shapes do not fit, a score is not finite, a ranking is called ``random``, or a count would
            leave nothing to train on.
    """
    examples = len(retrained.examples)
    asked = tuple(range(retrained.queries) if queries is None else queries)
    if RANDOM in rankings:
        raise EvaluationError(f"A ranking is called '{RANDOM}'.", cause="it is the control's name.", fix="rename it.")
    if not all(0 < count < examples for count in counts):
        raise EvaluationError(
            f"Cannot remove {list(counts)} of {examples} examples.", fix="remove at least 1 and leave at least 1."
        )
    before_Q = retrained.of_all(seeds)
    effects = {}
    for name, scores in rankings.items():
        scores_QN = finite(f"the scores of '{name}'", scores, "QN")
        same_length(examples_of_the_scores=scores_QN.shape[1], examples_of_the_store=examples)
        same_length(queries_of_the_scores=len(scores_QN), queries_of_the_store=retrained.queries)
        order = top(scores_QN, max(counts), seed)
        masks_MN = np.stack([_without(order[q, :k], examples) for k in counts for q in asked])
        after_KQSQ = retrained.measure(masks_MN, seeds).reshape(len(counts), len(asked), len(seeds), -1)
        own = [(before_Q - after_KQSQ[:, i])[:, :, q].mean(1) for i, q in enumerate(asked)]
        effects[name] = np.stack(own, axis=1)
    order = top(np.zeros((draws, examples)), max(counts), seed + 1)
    masks_MN = np.stack([_without(drawn[:k], examples) for k in counts for drawn in order])
    after_KDSQ = retrained.measure(masks_MN, seeds).reshape(len(counts), draws, len(seeds), -1)
    effects[RANDOM] = (before_Q - after_KDSQ).mean((1, 2))[:, list(asked)]
    return RemovalCurve(tuple(counts), asked, effects)


def _without(removed: np.ndarray, examples: int) -> np.ndarray:
    mask_N = np.ones(examples, bool)
    mask_N[removed] = False
    return mask_N
