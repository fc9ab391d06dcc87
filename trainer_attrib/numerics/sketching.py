"""Two-sided sketches: of a per-example gradient from its two factors, and of a whole weight matrix."""

from __future__ import annotations

import torch
from torch import Tensor

_CHUNK = 1024  # products at a time


def as_matrix(weight: Tensor) -> Tensor:
    """A weight as the matrix [R, C] that is sketched: a vector is one row, a convolution [out, in * kernel]."""
    return weight.unsqueeze(0) if weight.dim() == 1 else weight.flatten(1)


def sketch_examples(left_BSK: Tensor, right_BSK: Tensor) -> Tensor:
    """Per-example sketches from projected factors.

    The gradient of example b is G_b = sum_s l_s r_s^T, so its sketch P_l G_b P_r^T is a sum of products of *projected*
    factors: [B, R, C] is never formed (Choe et al. 2024, "LoGra", equation 6).

    Args:
        left_BSK: factors on the rows' side, projected: [B, S, K_l].
        right_BSK: factors on the columns' side, projected: [B, S, K_r].

    Returns:
        [B, K_l, K_r].
    """
    if left_BSK.shape[1] == 1:  # outer products, for which a matrix product is up to eight times slower (docs/log.md)
        return left_BSK.transpose(1, 2) * right_BSK
    return torch.bmm(left_BSK.transpose(1, 2), right_BSK)


def sketch_owned(left_PK: Tensor, right_PK: Tensor, owner_P: Tensor, count: int) -> Tensor:
    """The same from factors in any order, each of which belongs to one example.

    Args:
        left_PK: factors on the rows' side, projected: [P, K_l].
        right_PK: factors on the columns' side, projected: [P, K_r].
        owner_P: the example of each, below ``count``.
        count: B.

    Returns:
        [B, K_l, K_r].
    """
    sketch_BKK = left_PK.new_zeros(count, left_PK.shape[1], right_PK.shape[1])
    for left, right, owner in zip(left_PK.split(_CHUNK), right_PK.split(_CHUNK), owner_P.split(_CHUNK), strict=True):
        sketch_BKK.index_add_(0, owner, left.unsqueeze(2) * right.unsqueeze(1))
    return sketch_BKK


def sketch_matrix(weight_RC: Tensor, left_KR: Tensor, right_KC: Tensor) -> Tensor:
    """P_l W P_r^T, the sketch of a weight, of its gradient or of its update: [K_l, K_r].

    The rows are projected first: of the two orders that product is measured to be the faster one (docs/log.md).
    """
    return (left_KR @ weight_RC) @ right_KC.T


def add_bias(sketch_KK: Tensor, bias: Tensor, axis: int, side_KD: Tensor, bias_K: Tensor) -> Tensor:
    """The sketch of a weight whose bias is one more row (axis 0) or column (axis 1), from the sketch without it.

    Args:
        sketch_KK: sketch of the weight alone, [K_l, K_r].
        bias: [D], along the axis that the bias does not extend.
        axis: that the bias extends.
        side_KD: projection of the other axis, [K, D].
        bias_K: the extended axis's projection of the bias's own row or column, [K].
    """
    projected_K = side_KD @ bias
    return torch.addr(sketch_KK, projected_K, bias_K) if axis == 1 else torch.addr(sketch_KK, bias_K, projected_K)


def unit_rows(rows_NK: Tensor) -> tuple[Tensor, Tensor]:
    """Rows scaled to unit norm, and their norms [N]; zero and non-finite rows become zero rows with that norm."""
    norms_N = rows_NK.norm(dim=1)
    usable_N = torch.isfinite(norms_N) & (norms_N > 0)
    safe_N = torch.where(usable_N, norms_N, torch.ones_like(norms_N))
    unit_NK = torch.where(usable_N[:, None], rows_NK / safe_N[:, None], torch.zeros_like(rows_NK))
    return unit_NK, norms_N
