"""Axes that a projection keeps as they are need no matrix product, and nothing else changes."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from trainer_attrib.tap.layers import LayerRule, Pair, rule_for
from trainer_attrib.tap.plan import SketchPlan, WeightPlan
from trainer_attrib.tap.projections import Projections

LAYERS = {
    "linear": lambda: nn.Linear(5, 3),
    "without bias": lambda: nn.Linear(5, 3, bias=False),
    "transposed": lambda: Conv1D(3, 5),
}


def planned(layer: nn.Module, rank: int) -> tuple[SketchPlan, WeightPlan]:
    axis, bias = int(isinstance(layer, nn.Linear)), layer.bias is not None
    rows, columns = layer.weight.shape
    rows, columns = rows + (bias and axis == 0), columns + (bias and axis == 1)
    weight = WeightPlan("weight", "bias" if bias else "", axis, ("",), rows, columns, 0, 0, 0)
    plan = SketchPlan((weight,), {}, rank, 0).of_rank(rank)
    return plan, plan.weights[0]


def factors(layer: nn.Module, pair: Pair, bias: torch.Tensor | None, x: torch.Tensor, gradient: torch.Tensor):
    rule = rule_for(layer)
    assert isinstance(rule, LayerRule)
    return rule.watch(layer, x, pair, bias)(gradient)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("shape", [(4,), (4, 7), (4, 2, 3)])
@pytest.mark.parametrize("rank", [4, 16])  # of 4 only the output's axis is kept
@pytest.mark.parametrize("scaled", [False, True])
def test_factors_are_those_of_matrix_products_to_the_bit(kind, shape, rank, scaled):
    torch.manual_seed(0)
    layer = LAYERS[kind]()
    plan, weight = planned(layer, rank)
    projections = Projections(plan, layer)
    if scaled:
        projections = projections.scaled({"weight": (torch.rand(weight.rows), torch.rand(weight.columns))})
    pair = projections["weight"]
    kept = [diagonal is not None for diagonal in pair.diagonals]
    assert kept == [weight.rows <= rank, weight.columns <= rank]
    assert any(kept)
    x, gradient = torch.randn(*shape, 5), torch.randn(*shape, 3)
    for bias in {pair.bias, None}:  # a tied module may have none of its own
        fast = factors(layer, pair, bias, x, gradient)
        slow = factors(layer, dataclasses.replace(pair, diagonals=(None, None)), bias, x, gradient)
        assert all(torch.equal(a, b) for a, b in zip(fast, slow, strict=True))


def test_what_is_kept_does_not_change_with_the_layers_input():
    layer = nn.Linear(5, 3)
    plan, _ = planned(layer, 16)
    pair, x, gradient = Projections(plan, layer)["weight"], torch.randn(4, 5), torch.randn(4, 3)
    factors_of = rule_for(layer).watch(layer, x, pair, pair.bias)
    before = x.clone()
    x.zero_()
    assert torch.equal(factors_of(gradient)[1][:, 0, :5], before)


def test_turned_projections_keep_nothing():
    layer = nn.Linear(5, 3)
    plan, _ = planned(layer, 16)
    turned = Projections(plan, layer).rotated(plan, {"weight": (torch.randn(3, 3), torch.randn(6, 6))})
    assert turned["weight"].diagonals == (None, None)


def test_vectors_pulled_back_have_the_products_of_projected_gradients():
    layer = nn.Linear(5, 3).double()
    plan, weight = planned(layer, 2)
    projections, vectors_QK = Projections(plan, layer), torch.randn(4, plan.width).double()
    gradients = torch.randn(6, weight.rows, weight.columns).double()
    pair = projections["weight"]
    projected = (pair.left @ gradients @ pair.right.T).flatten(1)
    found = projections.pulled_back(vectors_QK) @ gradients.flatten(1).T
    torch.testing.assert_close(found, vectors_QK @ projected.T)
