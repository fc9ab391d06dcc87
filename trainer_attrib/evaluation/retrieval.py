"""Are the relevant examples ranked first? Top k, reciprocal ranks and recall, with their uncertainty and a control."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from trainer_attrib.errors import EvaluationError
from trainer_attrib.evaluation.estimates import Estimate, finite, mean_of, same_length


@dataclass(frozen=True)
class TopShare:
    """Mean over queries of the share of relevant examples among the top k, and its standard error over queries."""

    share: float
    standard_error: float

    def __str__(self) -> str:
        return f"{self.share:6.1%} ± {self.standard_error:.1%}"


@dataclass(frozen=True)
class FactTracing:
    """How well rankings find the examples that are relevant for each query. Estimates are means over queries.

    Attributes:
        mrr: reciprocal rank of the best relevant example.
        recall: k -> share of queries with a relevant example among the top k (TrackStar's Recall@k).
        share_of_relevant: k -> share of a query's relevant examples that are among the top k.
        reciprocal_ranks: float64 [Q], what ``mrr`` is the mean of.
    """

    mrr: Estimate
    recall: dict[int, Estimate]
    share_of_relevant: dict[int, Estimate]
    reciprocal_ranks: np.ndarray

    def __str__(self) -> str:
        return ", ".join([f"MRR {self.mrr}", *(f"Recall@{k} {found}" for k, found in self.recall.items())])


def top(scores: np.ndarray, k: int, seed: int = 0) -> np.ndarray:
    """Positions of each query's k best examples, best first, [Q, min(k, N)].

    Ties are broken at random: lexical scores tie often, and an order such as that of ids may know the answer.

    Args:
        scores: [Q, N].
        k: how many.
        seed: of the order among ties.
    """
    random = np.random.default_rng(seed)
    return np.array([np.lexsort((random.random(scores.shape[1]), -row))[:k] for row in scores])


def share_in_top(scores: np.ndarray, relevant: np.ndarray, k: int, seed: int = 0) -> TopShare:
    """Share of relevant examples among each query's k best, ties broken at random.

    Args:
        scores: [Q, N].
        relevant: boolean [N], the same examples for every query, or [Q, N].
        k: how many of each ranking.
        seed: of the order among ties.
    """
    relevant = np.broadcast_to(relevant, scores.shape)
    return _mean(np.take_along_axis(relevant, top(scores, k, seed), 1).mean(1))


def random_share(relevant: np.ndarray, k: int, queries: int, seed: int = 0) -> TopShare:
    """The same figure for rankings drawn at random."""
    return share_in_top(np.zeros((queries, relevant.shape[-1])), relevant, k, seed)


def fact_tracing(scores: np.ndarray, relevant: np.ndarray, ks: Sequence[int] = (1, 10)) -> FactTracing:
    """Mean reciprocal rank and recall of the relevant examples (Chang et al. 2024, "TrackStar").

    Ties are not broken: every figure is its expectation over all orders of tied examples, so that it depends neither on
    the order of the examples nor on a seed.

    Args:
        scores: [Q, N].
        relevant: boolean [Q, N], or [N] where the same examples are relevant for every query. One or more per query.
        ks: numbers of best examples to look at.

    Raises:
        EvaluationError: a query has no relevant example, shapes do not fit, or a score is not finite.
    """
    scores_QN = finite("scores", scores, "QN")
    same_length(examples_of_the_scores=scores_QN.shape[1], examples_that_may_be_relevant=np.shape(relevant)[-1])
    if np.ndim(relevant) == 2:
        same_length(queries_of_the_scores=len(scores_QN), queries_with_relevant_examples=len(relevant))
    relevant_QN = np.broadcast_to(np.asarray(relevant, bool), scores_QN.shape)
    if nothing := int((~relevant_QN.any(1)).sum()):
        raise EvaluationError(
            f"{nothing} of {len(scores_QN)} queries have no relevant example.",
            cause="they cannot be answered right, and a rank of infinity would look like a bad ranking.",
            fix="leave these queries out, and say how many there were.",
        )
    first = [_place_of_first(row, marks) for row, marks in zip(scores_QN, relevant_QN, strict=True)]
    reciprocal_Q = np.array([(chance / (above + 1 + np.arange(len(chance)))).sum() for above, chance in first])
    found = {k: mean_of(np.array([chance[: max(k - above, 0)].sum() for above, chance in first])) for k in ks}
    shares = {
        k: mean_of(np.array([_share(row, marks, k) for row, marks in zip(scores_QN, relevant_QN, strict=True)]))
        for k in ks
    }
    return FactTracing(mean_of(reciprocal_Q), found, shares, reciprocal_Q)


def _place_of_first(scores_N: np.ndarray, relevant_N: np.ndarray) -> tuple[int, np.ndarray]:
    """How many examples are above the best relevant one, and the chance of each place among those that tie with it."""
    best = scores_N[relevant_N].max()
    above, tied = int((scores_N > best).sum()), int((scores_N == best).sum())
    right = int((relevant_N & (scores_N == best)).sum())
    # Place j is the first relevant one: the j before it are not, it is.
    left = tied - np.arange(tied - right + 1)
    not_before = np.concatenate([[1.0], np.cumprod(1 - right / left[:-1])])
    return above, not_before * right / left


def _share(scores_N: np.ndarray, relevant_N: np.ndarray, k: int) -> float:
    """Expected share of the relevant examples that are among the top k."""
    k = min(k, len(scores_N))
    last = np.partition(scores_N, -k)[-k]
    above, tied = scores_N > last, scores_N == last
    found = (relevant_N & above).sum() + (k - above.sum()) * (relevant_N & tied).sum() / tied.sum()
    return float(found / relevant_N.sum())


def _mean(shares: np.ndarray) -> TopShare:
    spread = shares.std(ddof=1) / len(shares) ** 0.5 if len(shares) > 1 else 0.0
    return TopShare(float(shares.mean()), float(spread))
