"""Factored second moments, which fold into the two sides of a projection."""

from __future__ import annotations

from collections.abc import Iterable
from math import isfinite

import torch
from torch import Tensor


def factor(moment_RC: Tensor) -> tuple[Tensor, Tensor]:
    """Row and column means of a second moment, V ~ r c^T / mean(r) (Shazeer & Stern 2018, "Adafactor", section 3).

    Args:
        moment_RC: bias-corrected second moment of a weight, [R, C], non-negative.

    Returns:
        r [R] and c [C] in float64.
    """
    moment_RC = moment_RC.double()
    return moment_RC.mean(1), moment_RC.mean(0)


def append_bias(rows_R: Tensor, columns_C: Tensor, bias: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """The means of a second moment to which its bias's is appended as one more row (axis 0) or column (axis 1).

    Args:
        rows_R: row means without the bias, [R].
        columns_C: column means without the bias, [C].
        bias: the bias's second moment, along the axis that it does not extend: [C] for axis 0, [R] for axis 1.
        axis: that the bias extends.

    Returns:
        row and column means in float64, one of them longer by 1.
    """
    rows_R, columns_C, bias = rows_R.double(), columns_C.double(), bias.double()
    along, across = (rows_R, columns_C) if axis == 0 else (columns_C, rows_R)
    count = len(along)
    along, across = torch.cat([along, bias.mean().reshape(1)]), (across * count + bias) / (count + 1)
    return (along, across) if axis == 0 else (across, along)


def lifted(rows_R: Tensor, columns_C: Tensor, floor: float) -> tuple[Tensor, Tensor]:
    """The means with those below ``floor`` times their own mean lifted to it, [R] and [C]."""
    return rows_R.clamp_min(floor * rows_R.mean()), columns_C.clamp_min(floor * columns_C.mean())


def root_mean(factors: Iterable[tuple[Tensor, Tensor]]) -> float:
    """Root of the mean of all entries of several second moments: the size of a typical entry of the gradient.

    Args:
        factors: row means r [R] and column means c [C] of each.

    Returns:
        1.0 where there is none, or they are all zero.
    """
    sums = [
        (float(rows_R.mean()) * len(rows_R) * len(columns_C), len(rows_R) * len(columns_C))
        for rows_R, columns_C in factors
    ]
    mean = sum(total for total, _ in sums) / max(1, sum(count for _, count in sums))
    return mean**0.5 if mean > 0 and isfinite(mean) else 1.0


def inverse_root(rows_R: Tensor, columns_C: Tensor, floor: float = 1e-4) -> tuple[Tensor, Tensor]:
    """Scales a, b with a b^T ~ 1/sqrt(V), to be multiplied into the columns of the two projections.

    A row that received (almost) no gradient yet, such as the embedding of an unseen token, would get an unbounded
    scale. Factors below ``floor`` times their mean are lifted to it, which bounds each side's amplification
    by ``floor ** -0.5`` = 100 times the average scale.

    Args:
        rows_R: row means r, [R].
        columns_C: column means c, [C].
        floor: relative floor, between 0 and 1.

    Returns:
        a [R] and b [C], float64, finite; ones where the whole moment is zero.
    """
    mean = rows_R.mean()
    if not torch.isfinite(mean) or mean <= 0:
        return torch.ones_like(rows_R), torch.ones_like(columns_C)
    rows_R, columns_C = rows_R.clamp_min(floor * mean), columns_C.clamp_min(floor * mean)
    return (mean.sqrt() / rows_R).sqrt(), (mean.sqrt() / columns_C).sqrt()
