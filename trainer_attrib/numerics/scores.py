"""Scores between query sketches and example rows, their corrections over states of the model, and their ranking."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def grad_dot(queries_QK: Tensor, unit_NK: Tensor, norms_N: Tensor) -> Tensor:
    """Predicted increase of each behavior per unit learning rate of training on each example, [Q, N], float32.

    One gradient step on example z moves the weights by -lr * grad loss(z), hence the sign: a positive score means that
    training on the example increased the behavior (Pruthi et al. 2020, "TracIn", equation 3 for one checkpoint).

    Args:
        queries_QK: sketches of the behaviors' gradients.
        unit_NK: unit-norm sketches of the examples' loss gradients.
        norms_N: norms of the examples' loss gradients, [N].
    """
    return -(queries_QK.float() @ unit_NK.float().T) * norms_N.float()


def descent(queries_QK: Tensor) -> Tensor:
    """Minus the queries scaled to unit norm, [Q, K], float32: their products with unit-norm rows are cosines of the
    behaviors' gradients and the examples' negative loss gradients, in [-1, 1].

    Zero where either side is zero. Unit norm keeps examples with large gradients from winning every query
    (Chang et al. 2024, "TrackStar", section 3).
    """
    lengths_Q = queries_QK.float().norm(dim=1, keepdim=True)
    return -queries_QK.float() / torch.where(lengths_Q > 0, lengths_Q, 1.0)


def standardized(scores_QN: np.ndarray) -> np.ndarray:
    """Each query's scores with mean 0 and standard deviation 1 over the examples, [Q, N]; 0 where all are equal.

    Scores of different states of a model differ by orders of magnitude, so that sums of them as they are follow one
    state alone. NaN, an example that was not scored, stays NaN and counts for nothing.
    """
    known_QN = ~np.isnan(scores_QN)
    count_Q1 = np.maximum(known_QN.sum(1, keepdims=True), 1)
    mean_Q1 = np.nansum(scores_QN, 1, keepdims=True, dtype=np.float64) / count_Q1
    centred_QN = np.where(known_QN, scores_QN, mean_Q1) - mean_Q1
    spread_Q1 = np.sqrt((centred_QN**2).sum(1, keepdims=True) / count_Q1)
    rounding_Q1 = 1e-6 * np.abs(mean_Q1)  # equal float32 scores differ from their mean by less
    found_QN = np.where(spread_Q1 > rounding_Q1, centred_QN / np.where(spread_Q1 > 0, spread_Q1, 1.0), 0.0)
    return np.where(known_QN, found_QN, np.nan)


def denoised(states_SQN: np.ndarray, weights_S: np.ndarray | None = None) -> np.ndarray:
    """Weighted mean of scores over states of the model, [Q, N]: smooths what depends on how far an example happened to
    be fitted (Wu et al. 2024, "Enhancing training data attribution for large language models with fitting error
    consideration", denoising).

    Args:
        states_SQN: standardized scores at each state; NaN where an example has none at a state.
        weights_S: of the states, not negative, not all 0; all alike by default. They are scaled to sum to 1 over the
            states that scored an example.

    Returns:
        NaN where no state with a weight scored the example.
    """
    weights_S11 = np.ones((len(states_SQN), 1, 1)) if weights_S is None else np.asarray(weights_S, float)[:, None, None]
    known_SQN = ~np.isnan(states_SQN)
    whole_QN = (weights_S11 * known_SQN).sum(0)
    sums_QN = (weights_S11 * np.where(known_SQN, states_SQN, 0.0)).sum(0)
    return np.where(whole_QN > 0, sums_QN / np.where(whole_QN > 0, whole_QN, 1.0), np.nan)


def debiased(scores_QN: np.ndarray, base_QN: np.ndarray, beta: float | np.ndarray) -> np.ndarray:
    """Scores without ``beta`` times those at the base model, [Q, N]: takes out what it knew before (Wu et al. 2024,
    debiasing). Both standardized, or the larger scale decides alone.

    Args:
        scores_QN: of fine-tuned states.
        base_QN: at the start of the stage; NaN, no score there, takes nothing out.
        beta: one number, or one per query, [Q, 1]. Negative adds the base model's scores.
    """
    return scores_QN - beta * np.where(np.isnan(base_QN), 0.0, base_QN)


def rank(scores_N: np.ndarray, ids_N: np.ndarray, k: int, *, largest: bool) -> np.ndarray:
    """Positions of the k best scores, best first; ties are broken by id so that the order never depends on storage."""
    usable = np.flatnonzero(~np.isnan(scores_N))
    keys = -scores_N[usable] if largest else scores_N[usable]
    if k < len(keys):  # sorting by id is slow: only what can be among the best is sorted
        near = keys <= np.partition(keys, k)[k]
        usable, keys = usable[near], keys[near]
    return usable[np.lexsort((ids_N[usable], keys))[:k]]
