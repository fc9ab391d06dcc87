"""How far scores stand out from those of most examples."""

from __future__ import annotations

import numpy as np

NORMAL_MAD, NORMAL_MEAN_DEVIATION = 1.4826, 1.2533
"""A normal distribution's standard deviation over its median absolute deviation, and over its mean absolute one."""
_EQUAL = 1e-12  # spread, relative to the largest value, below which values differ by rounding only


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
