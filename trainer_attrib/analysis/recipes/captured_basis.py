"""The coordinates in which gradients vary most and curvature is nearly diagonal: eigenvectors of K-FAC's factors."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from trainer_attrib.analysis.examples import Examples
from trainer_attrib.analysis.gradient_rows import GradientRows
from trainer_attrib.tap.factors import FactorRecord, eigenbasis
from trainer_attrib.tap.plan import SketchPlan
from trainer_attrib.tap.projections import Projections


def captured_basis(
    model: nn.Module,
    start: Projections,
    plan: SketchPlan,
    examples: Examples,
    batches: Iterable[Sequence[int]],
    generator: torch.Generator,
) -> Projections:
    """Projections onto the leading eigenvectors of both factors' covariances, [k_l, R] and [k_r, C] for every weight.

    Args:
        model: stands at the weights of interest.
        start: coordinates in which covariances are measured: whole sides of a weight, or what a random projection
            leaves of those that are too long.
        plan: the same weights, in sketches of k_l by k_r.
        examples: the data.
        batches: positions of the examples to measure on.
        generator: of the predictions that are drawn for the examples.
    """
    sums: dict[str, tuple[Tensor, Tensor]] = {}
    with GradientRows(model, start, FactorRecord).opened() as rows:
        for positions in batches:
            for record in rows.of_curvature(examples, positions, generator):
                assert isinstance(record, FactorRecord)
                for name, (left_KK, right_KK) in record.covariances.items():
                    known = sums.get(name)
                    sums[name] = (left_KK, right_KK) if known is None else (known[0] + left_KK, known[1] + right_KK)
    turns = {}
    for weight in plan.weights:
        pair = start[weight.name]
        sides = zip(
            sums.get(weight.name, (None, None)), (pair.left, pair.right), (weight.left, weight.right), strict=True
        )
        turns[weight.name] = tuple(
            torch.eye(rank, len(side)).to(side) if known is None else eigenbasis(known, rank)
            for known, side, rank in sides
        )
    return start.rotated(plan, turns)
