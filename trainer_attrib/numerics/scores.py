"""Scores between query sketches and example rows, and their ranking."""

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


def grad_cos(queries_QK: Tensor, unit_NK: Tensor, norms_N: Tensor) -> Tensor:
    """Cosine of the behaviors' gradients and the examples' negative loss gradients, in [-1, 1]: [Q, N], float32.

    Zero where either side is zero. Unit norm keeps examples with large gradients from winning every query
    (Chang et al. 2024, "TrackStar", section 3).
    """
    lengths_Q = queries_QK.float().norm(dim=1, keepdim=True)
    scores_QN = -(queries_QK.float() @ unit_NK.float().T) / torch.where(lengths_Q > 0, lengths_Q, 1.0)
    return torch.where((norms_N > 0)[None, :], scores_QN, torch.zeros_like(scores_QN))


def rank(scores_N: np.ndarray, ids_N: np.ndarray, k: int, *, largest: bool) -> np.ndarray:
    """Positions of the k best scores, best first; ties are broken by id so that the order never depends on storage."""
    usable = np.flatnonzero(~np.isnan(scores_N))
    keys = -scores_N[usable] if largest else scores_N[usable]
    return usable[np.lexsort((ids_N[usable], keys))[:k]]
