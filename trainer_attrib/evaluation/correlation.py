"""Correlations of many rows at once, ties included."""

from __future__ import annotations

import numpy as np


def ranks(values: np.ndarray) -> np.ndarray:
    """Ranks along the last axis, from 0; equal values share the mean of theirs. Float64; ``values`` must be finite."""
    rows = values.reshape(-1, values.shape[-1])
    order = np.argsort(rows, axis=1, kind="stable")
    ordered = np.take_along_axis(rows, order, 1)
    begins = np.concatenate([np.ones((len(rows), 1), bool), np.diff(ordered, axis=1) != 0], axis=1)
    tie = np.cumsum(begins.ravel()) - 1  # runs of equal values; a row's first value begins one, so none spans two rows
    first, count = np.flatnonzero(begins.ravel()) % rows.shape[1], np.bincount(tie)
    result = np.empty(rows.shape)
    np.put_along_axis(result, order, (first + (count - 1) / 2)[tie].reshape(rows.shape), 1)
    return result.reshape(values.shape)


def pearson(predicted: np.ndarray, measured: np.ndarray) -> np.ndarray:
    """Pearson's correlation along the last axis, float64 [...].

    A constant prediction says nothing: 0. Where what was measured is constant, no prediction can be judged: nan.
    """
    a, b = (_centred(np.asarray(values, np.float64)) for values in (predicted, measured))
    length_a, length_b = (np.linalg.norm(values, axis=-1) for values in (a, b))
    product = (a * b).sum(-1) / np.where(length_a * length_b > 0, length_a * length_b, 1.0)
    return np.where(length_b > 0, np.clip(product, -1.0, 1.0), np.nan)


def spearman(predicted: np.ndarray, measured: np.ndarray) -> np.ndarray:
    """Spearman's rank correlation along the last axis, ties by mean ranks; constants as in :func:`pearson`."""
    return pearson(ranks(np.asarray(predicted, np.float64)), ranks(np.asarray(measured, np.float64)))


def _centred(values: np.ndarray) -> np.ndarray:
    # Rounding must not turn a constant into noise, whose correlation with anything is arbitrary.
    constant = (values == values[..., :1]).all(-1, keepdims=True)
    return np.where(constant, 0.0, values - values.mean(-1, keepdims=True))
