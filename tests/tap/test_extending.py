"""The worked example of docs/extending.md, and the layers that it is about, recorded whole."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tests.support import support
from trainer_attrib.ledger.reader import Ledger
from trainer_attrib.numerics.second_moment import factor, lifted
from trainer_attrib.tap import layers
from trainer_attrib.tap.plan import SketchPlan, plan_sketch
from trainer_attrib.tap.projections import Projections
from trainer_attrib.testing.oracle import exact_sketches, project_gradient, tapped_sketches, whole_weight
from trainer_attrib.testing.zoo import ConvNet, LinearOnThreeAxes, Member, NormsEverywhere
from trainer_attrib.types import SketchConfig

NORMS = support("Layers", "LayerNorm and RMSNorm, after `capture_norms()`")
PAGE = Path(__file__).parents[2] / "docs" / "extending.md"


@pytest.fixture(autouse=True)
def own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is registered here is forgotten again."""
    monkeypatch.setattr(layers, "_RULES", dict(layers._RULES))


def _agrees(member: Member, close: Callable) -> SketchPlan:
    projections = Projections(plan_sketch(member, SketchConfig(rank=4)), member)
    inputs = member.inputs(torch.Generator().manual_seed(0), 5)
    found, skipped = tapped_sketches(member, inputs, projections)
    assert skipped == {}
    close(found, exact_sketches(member, inputs, projections))
    return projections.plan


@support("Layers", "one's own layer, by the registry")
def test_the_worked_example_captures_its_layers(float64: None, close: Callable) -> None:
    blocks = PAGE.read_text().split("```python\n")[1:]
    code = next(block.split("```")[0] for block in blocks if "class ScaledLinear" in block)
    names: dict[str, Any] = {"__name__": "worked_example"}
    exec(compile(code, str(PAGE), "exec"), names)

    class Example(LinearOnThreeAxes):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.gain = names["ScaledLinear"](21, 23), names["Gain"](23)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.second(self.gain(self.first(x)))

    plan = _agrees(Example(), close)
    assert {weight.name for weight in plan.weights} == {"first.weight", "gain.weight", "second.weight"}
    assert plan.uncovered == {}


@NORMS
@pytest.mark.parametrize("name", layers._RMS_NORMS)
def test_norms_of_transformers(name: str, float64: None, close: Callable) -> None:
    module, _, prefix = f"transformers.models.{name}".rpartition(".")
    kind = getattr(pytest.importorskip(module), f"{prefix}RMSNorm")

    class WithNorm(LinearOnThreeAxes):
        def __init__(self) -> None:
            super().__init__()
            self.norm = kind(23, eps=0.1).double()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.second(self.norm(self.first(x)))

    layers.capture_norms()
    member = WithNorm()
    nn.init.normal_(member.norm.weight)
    projections = Projections(plan_sketch(member, SketchConfig(rank=4)), member)
    assert projections.plan.uncovered == {}
    inputs = member.inputs(torch.Generator().manual_seed(0), 5)
    found, _ = tapped_sketches(member, inputs, projections)
    close(found, exact_sketches(member, inputs, projections), relative=1e-6)  # the norm itself computes in float32


def test_an_input_changed_in_place_is_a_fault_and_not_a_wrong_row() -> None:
    norm = nn.LayerNorm(4)
    x = torch.randn(2, 3, 4)
    pair = layers.Pair(torch.eye(2), torch.eye(4), (torch.ones(2, 1), torch.eye(4)), torch.ones(2))
    factors_of = layers.LAYER_NORM.watch(norm, x, pair, pair.bias)
    x += 1
    with pytest.raises(layers.CaptureError, match="changed in place"):
        factors_of(torch.ones(2, 3, 4))


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(ConvNet, marks=support("Layers", "Conv1d, Conv2d"), id="ConvNet"),
        pytest.param(NormsEverywhere, marks=NORMS, id="NormsEverywhere"),
    ],
)
def test_convolutions_and_norms_are_recorded_like_matrices(
    kind: type[Member], tmp_path: Path, train: Callable, close: Callable
) -> None:
    """Audit, projected weights and factored second moments, computed here from the gradients."""
    layers.capture_norms()
    model, weights, moments = kind(), [], {}

    def watch(step: int, model: Member, optimizer: Any) -> None:
        weights.append({name: p.detach().double().clone() for name, p in model.named_parameters()})
        for name, p in model.named_parameters():
            squared = p.grad.double().square()
            moments[name] = squared if step == 1 else 0.95 * moments[name] + squared
        if step == 4:
            total = sum(0.95**k for k in range(4))
            found.update({name: moment / total for name, moment in moments.items()})

    found: dict[str, torch.Tensor] = {}
    train(model, tmp_path, steps=6, watch=watch, strict=True, sketch=SketchConfig(rank=4),
          optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2, betas=(0.9, 0.95)))  # fmt: skip
    stage = Ledger(tmp_path).stage("one")
    plan = SketchPlan.from_dict(stage.meta["plan"])
    assert plan.uncovered == stage.meta["coverage"]["partial"] == {}
    assert all(residual < 1e-4 for residual in stage.steps()["audit_residual"].to_pylist())
    raw = Projections(plan, model)
    rows = stage.steps()["projected_weights"].to_pylist()
    stored = [torch.from_numpy(np.frombuffer(row, np.float32).copy()).double() for row in rows]
    for k in range(5):
        update = {name: weights[k + 1][name] - weights[k][name] for name in weights[k]}
        close((stored[k + 1] - stored[k]).float(), project_gradient(plan, raw, update).float(), relative=1e-4)
    for weight in plan.weights:
        means = lifted(*factor(whole_weight(weight, found)), floor=1 / 4)
        for side, expected in zip(stage.factors(1)[weight.name], means, strict=True):
            close(side, expected, relative=1e-5)


def test_factored_moments_of_a_convolution(tmp_path: Path, train: Callable, close: Callable) -> None:
    """torch's Adafactor factors the kernel of each pair of channels."""
    model, gradients = ConvNet(), []
    train(model, tmp_path, steps=4, strict=True, optimizer=lambda p: torch.optim.Adafactor(p, lr=1e-2),
          watch=lambda step, model, _: gradients.append(model.second.weight.grad.double().square()))  # fmt: skip
    rows = columns = torch.zeros(())
    for t, squared in enumerate(gradients, 1):
        decay = 1 - t**-0.8
        rows = decay * rows + (1 - decay) * squared.mean(-1)
        columns = decay * columns + (1 - decay) * squared.mean(-2)
    moment = rows[..., :, None] * columns[..., None, :] / rows.mean(-1)[..., None, None]
    found = Ledger(tmp_path).stage("one").factors(1)["second.weight"]
    for side, expected in zip(found, lifted(*factor(moment.flatten(1)), floor=1 / 4), strict=True):
        close(side, expected, relative=1e-5)
