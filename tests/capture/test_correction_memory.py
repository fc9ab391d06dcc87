"""What the correction holds grows with rows + columns of a weight, never with their product."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import nn

from trainer_attrib.capture.processes import Processes
from trainer_attrib.capture.second_moments import SecondMoments
from trainer_attrib.tap.names import parameters_by_name
from trainer_attrib.tap.plan import plan_sketch
from trainer_attrib.tap.projections import Projections
from trainer_attrib.types import SketchConfig

RANK = 8


def corrected(model):
    """What corrects the sketches of a model that AdamW has updated once, and that AdamW."""
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(3, model[0].in_features)).square().mean().backward()
    optimizer.step()
    plan = plan_sketch(model, SketchConfig(rank=RANK))
    moments = SecondMoments(plan.weights, optimizer, parameters_by_name(model), "factored", Processes())
    factors = moments.factors(1)
    assert factors.keys() == {weight.name for weight in plan.weights}
    return plan, moments, factors, Projections(plan, model, factors, version=1), optimizer


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("width", [32, 128, 512])
def test_memory_held_for_the_correction(width, bias):
    plan, _, factors, projections, _ = corrected(
        nn.Sequential(nn.Linear(width, 4 * width, bias), nn.Linear(4 * width, 16, bias))
    )
    sides = sum(weight.rows + weight.columns for weight in plan.weights)
    assert sum(r.nbytes + c.nbytes for r, c in factors.values()) == 8 * sides  # float64, only while they are folded in
    assert 4 * RANK * sides <= projections.nbytes <= 2 * 4 * RANK * sides  # float32


def test_no_copy_of_the_second_moments_stays_behind():
    def large() -> int:
        gc.collect()
        return sum(type(o) is torch.Tensor and o.numel() >= 64 * 256 for o in gc.get_objects())

    model = nn.Sequential(nn.Linear(64, 256), nn.Linear(256, 64))
    _, kept, factors, projections, optimizer = corrected(model)
    with_it = large()
    assert with_it >= 6  # gradients and the optimizer's own two moments of both weights
    del kept, factors, projections
    assert large() == with_it
    assert optimizer.state
