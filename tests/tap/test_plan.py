"""The plan: which weights, which columns, why not the others; and what a fault inside a hook does."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from tests.support import support
from trainer_attrib.errors import CaptureError, UnsupportedLayerError
from trainer_attrib.tap import layers
from trainer_attrib.tap.layers import known_layers, register_layer, rule_for
from trainer_attrib.tap.module_tap import ModuleTap
from trainer_attrib.tap.plan import SketchPlan, plan_sketch
from trainer_attrib.tap.projections import Projections
from trainer_attrib.testing.oracle import exact_sketches, tapped_sketches
from trainer_attrib.testing.zoo import (
    MEMBERS,
    CalledTwice,
    FrozenBias,
    FrozenHalf,
    GroupedConv,
    LinearOnThreeAxes,
    Member,
    NormsEverywhere,
    TiedEmbedding,
)
from trainer_attrib.types import Layout, SketchConfig


@pytest.mark.parametrize("kind", MEMBERS, ids=lambda kind: kind.__name__)
def test_columns_are_contiguous_and_every_trainable_parameter_is_accounted_for(kind: type[Member]) -> None:
    member = kind()
    plan = plan_sketch(member, SketchConfig(rank=4))
    ends = [weight.span.stop for weight in plan.weights]
    assert [weight.offset for weight in plan.weights] == [0, *ends[:-1]]
    assert plan.width == ends[-1]
    assert all(weight.size <= 16 for weight in plan.weights)
    covered = {name for weight in plan.weights for name in (weight.name, weight.bias) if name}
    trainable = {name for name, p in member.named_parameters() if p.requires_grad}
    assert covered | set(plan.uncovered) == trainable
    assert not covered & set(plan.uncovered)


def test_plan_survives_json() -> None:
    plan = plan_sketch(TiedEmbedding(head_bias=True), SketchConfig(rank=4))
    assert SketchPlan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan


def test_tied_weight_has_one_block_and_both_modules() -> None:
    plan = plan_sketch(TiedEmbedding(), SketchConfig())
    assert {w.name: w.modules for w in plan.weights}["embedding.weight"] == ("embedding", "head")


def test_frozen_parameters_are_neither_captured_nor_reported() -> None:
    assert [w.name for w in plan_sketch(FrozenHalf(), SketchConfig()).weights] == ["second.weight"]
    frozen_bias = plan_sketch(FrozenBias(), SketchConfig())
    assert [w.bias for w in frozen_bias.weights] == ["", ""]
    assert frozen_bias.uncovered == {}


def test_globs_choose_and_exclude_modules_with_a_reason() -> None:
    plan = plan_sketch(LinearOnThreeAxes(), SketchConfig(modules="fir*, second", exclude=("second",)))
    assert [w.name for w in plan.weights] == ["first.weight"]
    assert plan.uncovered["second.weight"] == "left out by the settings"


@support("Layers", "layers of unknown types", refused=True)
def test_unknown_layers_are_reported_by_type() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    assert plan_sketch(model, SketchConfig()).uncovered == dict.fromkeys(
        ["1.bias", "1.weight"], "LayerNorm is not a known layer type"
    )


@support("Layers", "a model of unknown layers only", refused=True)
def test_model_without_known_layers_is_refused_naming_its_types() -> None:
    with pytest.raises(
        UnsupportedLayerError, match=r"ConvTranspose2d.*LayerNorm.*torch\.nn\.modules\.linear\.Linear"
    ) as caught:
        plan_sketch(nn.Sequential(nn.ConvTranspose2d(1, 2, 3), nn.LayerNorm(2)), SketchConfig())
    assert isinstance(caught.value, CaptureError)
    assert "register_layer" in caught.value.fix


@support("Layers", "grouped convolutions", refused=True)
def test_a_convolution_in_groups_is_refused_with_a_reason() -> None:
    uncovered = plan_sketch(GroupedConv(), SketchConfig()).uncovered
    assert uncovered == dict.fromkeys(["second.weight", "second.bias"], "groups=7: its weight is 7 matrices, not one")


class _Standardized(nn.Conv2d):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self._conv_forward(input, self.weight - self.weight.mean(), self.bias)


@support("Layers", "a subclass with another forward", refused=True)
def test_a_subclass_that_computes_something_else_is_refused() -> None:
    model = nn.Sequential(_Standardized(1, 2, 3), nn.Linear(2, 2))
    assert plan_sketch(model, SketchConfig()).uncovered["0.weight"] == (
        "_Standardized has a forward of its own, unlike Conv2d"
    )


def test_a_plan_with_a_layer_that_is_not_registered_here_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """Recorded with norms, analyzed without having registered them."""
    model = NormsEverywhere()
    with monkeypatch.context() as patch:
        patch.setattr(layers, "_RULES", dict(layers._RULES))
        layers.capture_norms()
        plan = plan_sketch(model, SketchConfig())
        projections = Projections(plan, model)
    with pytest.raises(UnsupportedLayerError, match="'norm' is a LayerNorm") as caught:
        ModuleTap(model, plan, projections, print)
    assert "register" in caught.value.fix


@support("Layers", "Embedding with scale_grad_by_freq", refused=True)
def test_frequency_scaled_embedding_is_refused() -> None:
    model = nn.Sequential(nn.Embedding(5, 3, scale_grad_by_freq=True), nn.Linear(3, 2))
    assert "couples the examples" in plan_sketch(model, SketchConfig()).uncovered["0.weight"]


def test_subclasses_follow_their_base_and_new_types_can_be_registered() -> None:
    class OwnLinear(nn.Linear):
        pass

    class Stranger(nn.Module):
        pass

    assert rule_for(OwnLinear(2, 2)) is rule_for(nn.Linear(2, 2))
    assert rule_for(Stranger()) is None
    register_layer(Stranger, rule_for(nn.Linear(2, 2)))
    assert rule_for(Stranger()) is rule_for(nn.Linear(2, 2))
    assert any(name.endswith("Stranger") for name in known_layers())


def test_nothing_is_captured_without_a_record_or_without_gradients() -> None:
    member = CalledTwice()
    projections = Projections(plan_sketch(member, SketchConfig()), member)
    tap = ModuleTap(member, projections.plan, projections, lambda fault: None).attach()
    inputs = member.inputs(torch.Generator().manual_seed(0), 3)
    member(**inputs[0]).sum().backward()
    assert tap.record is None
    record = tap.open(3, Layout.ROWS)
    with torch.no_grad():
        member(**inputs[0])
    tap.detach()
    assert not record.forwards
    assert not record.sketches.any()


@pytest.mark.parametrize("when", ["forward", "backward"])
def test_hook_fault_reaches_the_handler_and_not_training(when: str, monkeypatch: pytest.MonkeyPatch) -> None:
    member = LinearOnThreeAxes()
    projections = Projections(plan_sketch(member, SketchConfig()), member)
    inputs = member.inputs(torch.Generator().manual_seed(0), 3)
    member(**inputs[0]).sum().backward()
    expected = member.first.weight.grad.clone()
    member.zero_grad()
    faults: list[Exception] = []
    tap = ModuleTap(member, projections.plan, projections, faults.append).attach()
    record = tap.open(3, Layout.ROWS)

    def broken(*args: object) -> None:
        raise RuntimeError("broken")

    monkeypatch.setattr("trainer_attrib.tap.layers._three_axes" if when == "forward" else record, *(
        (broken,) if when == "forward" else ("add", broken)
    ))  # fmt: skip
    member(**inputs[0]).sum().backward()
    tap.detach()
    assert [str(fault) for fault in faults] == ["broken", "broken"]
    assert torch.equal(member.first.weight.grad, expected)


def test_accumulated_passes_keep_their_own_rows(float64: None, close: object) -> None:
    """Two forwards, two backwards: each record holds its own micro-batch."""
    member = LinearOnThreeAxes()
    projections = Projections(plan_sketch(member, SketchConfig(rank=4)), member)
    generator = torch.Generator().manual_seed(0)
    for _ in range(2):
        inputs = member.inputs(generator, 3)
        close(tapped_sketches(member, inputs, projections)[0], exact_sketches(member, inputs, projections))


def test_reentrant_checkpoints_of_overlapping_passes_are_left_out_not_mixed_up():
    """Recomputed layers know no forward pass: with two open, a sketch could land in the wrong one."""
    import torch
    from torch import nn
    from torch.utils.checkpoint import checkpoint

    from trainer_attrib.tap.module_tap import ModuleTap
    from trainer_attrib.tap.plan import plan_sketch
    from trainer_attrib.tap.projections import Projections
    from trainer_attrib.types import Layout, SketchConfig

    inner, outer = nn.Linear(4, 4), nn.Linear(4, 1)
    model = nn.Sequential(inner, outer)
    plan = plan_sketch(model, SketchConfig())

    def fail(fault):
        raise fault

    tap = ModuleTap(model, plan, Projections(plan, model), fail).attach()

    def forward():
        record = tap.open(3, Layout.ROWS)
        x = torch.randn(3, 4, requires_grad=True)
        return record, outer(checkpoint(inner, x, use_reentrant=True)).sum()

    (first, one), (second, two) = forward(), forward()
    (one + two).backward()
    assert [record.backwards for record in (first, second)] == [{"1": 1}, {"1": 1}]
    assert "reentrant" in second.skipped["0"]
    third, loss = forward()
    loss.backward()
    assert third.backwards == {"0": 1, "1": 1}
    tap.detach()
