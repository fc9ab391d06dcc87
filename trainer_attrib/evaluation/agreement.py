"""Do predictions order interventions as really retraining does? The core of datamodeling and leave-out scores."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from trainer_attrib.errors import EvaluationError
from trainer_attrib.evaluation.correlation import pearson, spearman
from trainer_attrib.evaluation.estimates import Estimate, finite, mean_of, same_length

CORRELATIONS: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {"spearman": spearman, "pearson": pearson}
_GROUPS = 100  # of the jackknife: with more subsets than these it leaves out several at a time
_FEWEST = 10  # subsets for it: over three, leaving one out leaves correlations of 1 and -1


@dataclass(frozen=True)
class Agreement:
    """Correlation of predicted and measured behavior over M subsets of the training data, for each query.

    Attributes:
        correlation: ``spearman`` or ``pearson``.
        per_query: float64 [Q]; nan for queries whose measured behavior was the same in all subsets.
        subset_error: standard error of the mean that comes from having drawn these subsets, by the jackknife; nan with
            fewer than ten.
        subsets: M.
        seeds: models trained per subset; the measured behavior is their mean.
        seed_agreement: mean over queries of the correlation between two seeds; None with one seed.
        ceiling: the correlation that a perfect prediction of the mean over all seeds would have with the mean
            over ``seeds`` of them; None with one seed.
    """

    correlation: str
    per_query: np.ndarray
    subset_error: float
    subsets: int
    seeds: int
    seed_agreement: float | None
    ceiling: float | None

    @property
    def mean(self) -> Estimate:
        """Mean over the queries that can be evaluated, and its standard error over queries."""
        return mean_of(self.per_query[~np.isnan(self.per_query)])

    @property
    def left_out(self) -> int:
        """Queries that cannot be evaluated."""
        return int(np.isnan(self.per_query).sum())

    def __str__(self) -> str:
        ceiling = "not known from one seed" if self.ceiling is None else f"{self.ceiling:.3f}"
        skipped = f", {self.left_out} queries without variation left out" if self.left_out else ""
        spread = "" if np.isnan(self.subset_error) else f"± {self.subset_error:.3f} over "
        return (
            f"{self.correlation} {self.mean} over queries ({spread}{self.subsets} subsets), "
            f"ceiling {ceiling}, {self.seeds} seed{'s' if self.seeds > 1 else ''} per subset{skipped}"
        )


def agreement(predicted: np.ndarray, measured: np.ndarray, correlation: str = "spearman") -> Agreement:
    """Correlate over subsets, for each query.

    The ceiling is classical test theory: the mean of S seeds has reliability ``S r / (1 + (S - 1) r)`` where r is the
    correlation between seeds (Spearman 1910 and Brown 1910), and nothing can correlate with it more than the root of
    that, in expectation. r is averaged over pairs of seeds and then over queries, since the root of a single query's
    noisy r is biased. Exact for Pearson's correlation; with ranks it is an approximation.

    Args:
        predicted: [M, Q], larger where more of the behavior is predicted.
        measured: [M, S, Q], or [M, Q] with one seed.
        correlation: ``spearman`` or ``pearson``.

    Raises:
        EvaluationError: fewer than three subsets, shapes that do not fit, values that are not finite, or no query whose
            behavior varies.
    """
    predicted = finite("predicted", predicted, "MQ")
    measured = finite("measured", measured[:, None] if np.ndim(measured) == 2 else measured, "MSQ")
    subsets, seeds, queries = measured.shape
    same_length(subsets_of_the_prediction=len(predicted), subsets_that_were_measured=subsets)
    same_length(queries_of_the_prediction=predicted.shape[1], queries_that_were_measured=queries)
    if correlation not in CORRELATIONS:
        raise EvaluationError(f"Unknown correlation {correlation!r}.", fix=f"use one of {sorted(CORRELATIONS)}.")
    if subsets < 3:
        raise EvaluationError(
            f"A correlation over {subsets} subsets says nothing.", fix="measure at least 3; 100 is the custom."
        )
    correlate = CORRELATIONS[correlation]
    predicted_QM, truth_QM = predicted.T, measured.mean(1).T
    per_query = correlate(predicted_QM, truth_QM)
    if np.isnan(per_query).all():
        raise EvaluationError(
            f"The measured behavior of all {queries} queries is the same in all {subsets} subsets.",
            cause="the training function ignores its subset, or returns the same model object.",
            fix="look at one trained model of two different subsets.",
        )
    between = seed_agreement(measured, correlation) if seeds > 1 else None
    error = _jackknife(correlate, predicted_QM, truth_QM)
    return Agreement(correlation, per_query, error, subsets, seeds, between, _ceiling(between, seeds))


def seed_agreement(measured: np.ndarray, correlation: str = "spearman") -> float:
    """Mean over queries and pairs of seeds of the correlation between what two seeds measured, over subsets.

    Args:
        measured: [M, S, Q] with at least two seeds.
        correlation: ``spearman`` or ``pearson``.
    """
    seeds_SQM = measured.transpose(1, 2, 0)
    pairs = [(a, b) for a in range(len(seeds_SQM)) for b in range(a)]
    found_PQ = np.stack([CORRELATIONS[correlation](seeds_SQM[a], seeds_SQM[b]) for a, b in pairs])
    return _known_mean(found_PQ)


def _ceiling(between: float | None, seeds: int) -> float | None:
    if between is None:
        return None
    return float(np.sqrt(max(seeds * between / (1 + (seeds - 1) * between), 0.0))) if between > 0 else 0.0


def _jackknife(
    correlate: Callable[[np.ndarray, np.ndarray], np.ndarray], predicted_QM: np.ndarray, truth_QM: np.ndarray
) -> float:
    """Standard error of the mean correlation over queries, from leaving out subsets (Efron & Stein 1981)."""
    subsets = predicted_QM.shape[1]
    if subsets < _FEWEST:
        return float("nan")
    groups = np.array_split(np.arange(subsets), min(subsets, _GROUPS))
    kept = (np.delete(np.arange(subsets), group) for group in groups)
    means = np.array([_known_mean(correlate(predicted_QM[:, k], truth_QM[:, k])) for k in kept])
    return float(np.sqrt((len(means) - 1) * means.var()))


def _known_mean(values: np.ndarray) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else 0.0
