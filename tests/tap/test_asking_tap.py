"""Rows of passes that form no weight's gradient are those of ordinary backward passes, whatever the module does."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from trainer_attrib.tap import layers
from trainer_attrib.tap.asking_tap import AskingTap
from trainer_attrib.tap.plan import plan_sketch
from trainer_attrib.tap.projections import Projections
from trainer_attrib.testing.oracle import exact_sketches
from trainer_attrib.testing.zoo import MEMBERS, CheckpointedReentrant, TwoForwardsOneBackward
from trainer_attrib.types import Layout, SketchConfig

KINDS = [kind for kind in MEMBERS if kind not in (CheckpointedReentrant, TwoForwardsOneBackward)]


class InPlaceAfterFirst(nn.Module):
    """The first layer's output is a view, which is changed in place, and its input is data."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, x):
        return self.second(torch.relu_(self.first(x)))


@pytest.fixture(autouse=True)
def norms(monkeypatch):
    monkeypatch.setattr(layers, "_RULES", dict(layers._RULES))
    layers.capture_norms()


def asked(model, plan, rows, value, frozen=True):
    """Rows of one pass, and the weights whose gradients it formed."""
    formed = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.register_hook(lambda _, name=name: formed.append(name))
    tap = AskingTap(model, plan, Projections(plan, model), pytest.fail)
    tap.attach()
    try:
        torch.manual_seed(0)
        record = tap.open(rows, Layout.ROWS)
        tap.backward(value())
        return record.sketches, tuple(formed)
    finally:
        tap.detach()


@pytest.mark.parametrize("kind", [pytest.param(kind, id=kind.__name__) for kind in KINDS])
def test_rows_equal_projected_gradients_and_no_weight_s_gradient_is_formed(kind, float64, close):
    torch.manual_seed(3)
    member = kind().train()
    plan = plan_sketch(member, SketchConfig(rank=4, seed=1))
    inputs = member.inputs(torch.Generator().manual_seed(7), 5)
    expected = exact_sketches(member, inputs, Projections(plan, member))
    planned = {weight.name for weight in plan.weights}
    for name, parameter in member.named_parameters():
        parameter.requires_grad_(name in planned)
    found, formed = asked(member, plan, 5, lambda: member.losses([member(**kw) for kw in inputs], inputs).sum())
    keep = torch.cat([torch.full((weight.size,), weight.name not in member.left_out) for weight in plan.weights])
    close(found[:, keep], expected[:, keep])
    assert {name for name in formed if "expert" not in name} == set()


def test_a_first_layer_whose_output_is_changed_in_place(float64, close):
    torch.manual_seed(0)
    model, x = InPlaceAfterFirst(), torch.randn(4, 7, 6)
    plan = plan_sketch(model, SketchConfig(rank=64))
    found, formed = asked(model, plan, 4, lambda: model(x).square().sum())
    for row, example in zip(found, x, strict=True):
        grads = torch.autograd.grad(model(example[None]).square().sum(), list(model.parameters()))
        expected = [torch.cat([w, b[:, None]], 1).flatten() for w, b in zip(grads[::2], grads[1::2], strict=True)]
        close(row, torch.cat(expected))
    assert formed == ()


def test_what_cannot_be_told_apart_by_example_does_not_hide_what_is_behind_it(float64, close):
    """Positions are the same for every row; the layers before and after them still get theirs."""

    class Positions(nn.Module):
        def __init__(self):
            super().__init__()
            self.place, self.body = nn.Embedding(3, 4), nn.Linear(4, 2)

        def forward(self, x):
            return self.body(self.place(torch.arange(3))[None] * x[:, :, None])

    torch.manual_seed(0)
    model, x = Positions(), torch.randn(5, 3)
    plan = plan_sketch(model, SketchConfig(rank=64))
    [body] = [weight for weight in plan.weights if weight.name == "body.weight"]
    found, _ = asked(model, plan, 5, lambda: model(x).square().sum())
    for row, example in zip(found, x, strict=True):
        w, b = torch.autograd.grad(model(example[None]).square().sum(), [model.body.weight, model.body.bias])
        close(row[body.span], torch.cat([w, b[:, None]], 1).flatten())


class Tied(nn.Module):
    """An embedding whose weight is the head's too."""

    def __init__(self):
        super().__init__()
        self.embedding, self.middle, self.head = nn.Embedding(7, 5), nn.Linear(5, 5), nn.Linear(5, 7, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens):
        return self.head(torch.tanh(self.middle(self.embedding(tokens))))


def test_a_weight_that_an_unwatched_layer_uses_as_well(float64, close):
    """Only the head is in the plan: the middle is still the first layer, and the head has rows of its own use."""
    model, tokens = Tied(), torch.arange(12).reshape(4, 3) % 7
    whole = plan_sketch(model, SketchConfig(rank=4, seed=1, modules="middle,head"))
    expected = torch.zeros(4, whole.width)
    untied = Tied()
    untied.load_state_dict(model.state_dict())
    untied.head.weight = nn.Parameter(model.head.weight.detach().clone())
    projections = Projections(whole, model)
    [middle, head] = sorted(whole.weights, key=lambda weight: "middle" not in weight.modules)
    for row, example in enumerate(tokens):
        untied.zero_grad()
        untied(example[None]).square().sum().backward()
        own = untied.middle.weight.grad, untied.middle.bias.grad
        expected[row, middle.span] = projections.sketch(middle, *own).flatten()
        expected[row, head.span] = projections.sketch(head, untied.head.weight.grad, None).flatten()
    found, formed = asked(model, whole, 4, lambda: model(tokens).square().sum())
    close(found, expected)
    assert formed == ()
    assert model.embedding.weight.requires_grad
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
