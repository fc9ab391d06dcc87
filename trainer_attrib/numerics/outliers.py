"""How far scores stand out from those of most examples."""

from __future__ import annotations

import numpy as np

NORMAL_MAD, NORMAL_MEAN_DEVIATION = 1.4826, 1.2533
"""A normal distribution's standard deviation over its median absolute deviation, and over its mean absolute one."""
_EQUAL = 1e-12  # spread, relative to the largest value, below which values differ by rounding only


def mean_standardised(scores_QN: np.ndarray) -> np.ndarray:
    """Mean over queries of scores of which each query's mean over the examples is 0 and its standard deviation 1, so
    that no query counts for more because its scores are larger. [N], float64.

    Args:
        scores_QN: what is not finite is unknown and left out; an example that no query knows is nan. A query whose
            scores are all equal gives 0 to each.
    """
    known_QN = np.isfinite(scores_QN)
    counts_Q1 = np.maximum(known_QN.sum(1, keepdims=True), 1)
    values_QN = np.where(known_QN, scores_QN, 0.0).astype(np.float64)
    centred_QN = np.where(known_QN, values_QN - values_QN.sum(1, keepdims=True) / counts_Q1, 0.0)
    spread_Q1 = np.sqrt((centred_QN**2).sum(1, keepdims=True) / counts_Q1)
    differs_Q1 = spread_Q1 > _EQUAL * np.abs(values_QN).max(1, keepdims=True, initial=0.0)
    standard_QN = np.divide(centred_QN, spread_Q1, out=np.zeros_like(centred_QN), where=differs_Q1)
    by_N = known_QN.sum(0)
    return np.where(by_N > 0, standard_QN.sum(0) / np.maximum(by_N, 1), np.nan)


def robust_z(scores_N: np.ndarray) -> np.ndarray:
    """(score - median) / (1.4826 median absolute deviation), [N], float64: standard deviations from the middle where
    most scores are normal, whatever a few do (Iglewicz & Hoaglin 1993, "How to detect and handle outliers", section 3).

    Where more than half of the scores are equal, the mean absolute deviation stands in, times 1.2533; where all are,
    every z is 0. nan stays nan.
    """
    known_N = scores_N[~np.isnan(scores_N)].astype(np.float64)
    if not len(known_N):
        return np.full(len(scores_N), np.nan)
    middle = np.median(known_N)
    away_N = np.abs(known_N - middle)
    rounding = _EQUAL * np.abs(known_N).max()
    spread = NORMAL_MAD * np.median(away_N)
    if spread <= rounding:
        spread = NORMAL_MEAN_DEVIATION * away_N.mean()
    if spread <= rounding:
        return np.where(np.isnan(scores_N), np.nan, 0.0)
    return (scores_N - middle) / spread
