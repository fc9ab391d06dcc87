"""Clusters of vectors, and which of many differences between groups are more than chance."""

from __future__ import annotations

import torch
from torch import Tensor

ROUNDS = 50


def spherical_clusters(x_NF: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Groups vectors by direction: each belongs to the centre to which its cosine is largest (Dhillon & Modha 2001,
    "Concept decompositions for large sparse text data using clustering"), begun as k-means++ does.

    Args:
        x_NF: vectors; those of length 0 belong to the first centre.
        count: of centres, at most; centres that lose all their vectors are left out.
        generator: of the first centres.

    Returns:
        Numbers of the clusters [N], and unit centres [K, F].
    """
    unit_NF = torch.nn.functional.normalize(x_NF, dim=1)
    centres_KF = _first(unit_NF, min(count, len(unit_NF)), generator)
    assigned_N = (unit_NF @ centres_KF.T).argmax(1)
    for _ in range(ROUNDS):
        sums_KF = torch.zeros_like(centres_KF).index_add(0, assigned_N, unit_NF)
        centres_KF = torch.nn.functional.normalize(sums_KF[sums_KF.norm(dim=1) > 0], dim=1)
        again_N = (unit_NF @ centres_KF.T).argmax(1)
        if torch.equal(again_N, assigned_N):
            break
        assigned_N = again_N
    used = assigned_N.unique()
    places = torch.zeros(len(centres_KF), dtype=torch.long)
    places[used] = torch.arange(len(used))
    return places[assigned_N], centres_KF[used]


def welch(inside_NM: Tensor, outside_NM: Tensor) -> Tensor:
    """Differences of means over their standard errors (Welch 1947), [M]."""
    difference_M = inside_NM.mean(0) - outside_NM.mean(0)
    return difference_M / (_square_error(inside_NM) + _square_error(outside_NM)).sqrt()


def z_values(x_NM: Tensor) -> Tensor:
    """Means over their standard errors, [M]."""
    return x_NM.mean(0) / _square_error(x_NM).sqrt()


def false_discovery_rates(z_M: Tensor) -> Tensor:
    """For each of many z values, the share of false discoveries if it and all larger ones are believed (Benjamini &
    Hochberg 1995), two-sided, [M]."""
    p_M = torch.erfc(z_M.abs() / 2**0.5)
    order = p_M.argsort()
    ranked = p_M[order] * len(p_M) / torch.arange(1, len(p_M) + 1)
    smallest = ranked.flip(0).cummin(0).values.flip(0).clamp(max=1)
    return torch.zeros_like(p_M).scatter(0, order, smallest)


def _square_error(x_NM: Tensor) -> Tensor:
    """Of the mean, as if one value more were one off: a side without any variance is not known exactly."""
    return (x_NM.var(0) + 1 / len(x_NM)) / len(x_NM)


def _first(unit_NF: Tensor, count: int, generator: torch.Generator) -> Tensor:
    chosen = [int(torch.randint(len(unit_NF), (), generator=generator))]
    for _ in range(count - 1):
        distance_N = (1 - (unit_NF @ unit_NF[chosen].T).max(1).values).clamp(min=0)
        if distance_N.sum() <= 0:
            break
        chosen.append(int(torch.multinomial(distance_N, 1, generator=generator)))
    return unit_NF[chosen]
