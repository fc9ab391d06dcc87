"""The steps table says what each executed update used and did."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from trainer_attrib.capture.moment_readers import second_moment
from trainer_attrib.capture.recorder import Recorder
from trainer_attrib.capture.step_recorder import StepRecorder
from trainer_attrib.ledger.reader import Ledger, StageReader
from trainer_attrib.numerics.second_moment import factor, lifted
from trainer_attrib.tap.plan import SketchPlan
from trainer_attrib.tap.projections import Projections
from trainer_attrib.testing.oracle import project_gradient, whole_weight
from trainer_attrib.testing.zoo import LinearOnThreeAxes, Member, TiedEmbedding
from trainer_attrib.types import SketchConfig

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, betas=(0.8, 0.95), weight_decay=0.1),
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "adamw-foreach": lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=True),
    "adam": lambda p: torch.optim.Adam(p, lr=1e-2, weight_decay=0.05),
    "amsgrad": lambda p: torch.optim.AdamW(p, lr=1e-2, amsgrad=True),
    "sgd-momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
}
optimizers = pytest.mark.parametrize("name", OPTIMIZERS)


def _weights(model: Member) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def _raw(stage: StageReader, model: Member) -> tuple[SketchPlan, Projections]:
    plan = SketchPlan.from_dict(stage.meta["plan"])
    return plan, Projections(plan, model)


@optimizers
@pytest.mark.parametrize("kind", [LinearOnThreeAxes, TiedEmbedding], ids=lambda kind: kind.__name__)
def test_differences_of_projected_weights_are_the_executed_update(
    name: str, kind: type[Member], tmp_path: Path, train: Callable, close: Callable
) -> None:
    model, history = kind(), []
    train(model, tmp_path, steps=6, clip=5.0, optimizer=OPTIMIZERS[name], sketch=SketchConfig(rank=4),
          watch=lambda step, model, optimizer: history.append(_weights(model)))  # fmt: skip
    stage = Ledger(tmp_path).stage("one")
    plan, raw = _raw(stage, model)
    rows = stage.steps()["projected_weights"].to_pylist()
    stored = [torch.from_numpy(np.frombuffer(row, np.float32).copy()) for row in rows]
    for before, after, first, second in zip(history, history[1:], stored, stored[1:], strict=False):
        update = {key: after[key] - before[key] for key in after}
        close(second - first, project_gradient(plan, raw, update), relative=1e-4)


@optimizers
def test_projected_weights_are_linear_in_the_update_in_double_precision(
    name: str, tmp_path: Path, train: Callable, close: Callable, float64: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The table stores float32; before that rounding the differences are exact."""
    projected: list[torch.Tensor] = []
    original = StepRecorder._project

    def spy(recorder: StepRecorder, weight: Any) -> torch.Tensor:
        found = original(recorder, weight)
        projected.append(found.flatten().clone())
        return found

    monkeypatch.setattr(StepRecorder, "_project", spy)
    model, history = LinearOnThreeAxes(), []
    train(model, tmp_path, steps=4, optimizer=OPTIMIZERS[name], sketch=SketchConfig(rank=4),
          watch=lambda step, model, optimizer: history.append(_weights(model)))  # fmt: skip
    plan, raw = _raw(Ledger(tmp_path).stage("one"), model)
    rows = [torch.cat(projected[k : k + 2]) for k in range(0, 8, 2)]
    for k in range(3):
        update = {key: history[k + 1][key] - history[k][key] for key in history[k]}
        close(rows[k + 1] - rows[k], project_gradient(plan, raw, update), relative=1e-10)


def test_settings_are_those_the_step_used(tmp_path: Path, train: Callable) -> None:
    """Two groups and a schedule that moves after each step: the table shows the values before the move."""
    used: list[list[float]] = []

    def two_groups(parameters: Any) -> torch.optim.Optimizer:
        weights = [p for p in parameters if p.dim() > 1]
        others = [p for p in parameters if p.dim() == 1]
        return torch.optim.AdamW(
            [{"params": weights, "weight_decay": 0.1}, {"params": others, "lr": 1e-3, "weight_decay": 0.0}],
            lr=1e-2, betas=(0.7, 0.9),
        )  # fmt: skip

    def schedule(step: int, model: Member, optimizer: torch.optim.Optimizer) -> None:
        used.append([group["lr"] for group in optimizer.param_groups])
        for group in optimizer.param_groups:
            group["lr"] *= 0.5

    train(LinearOnThreeAxes(), tmp_path, steps=4, optimizer=two_groups, watch=schedule)
    stage = Ledger(tmp_path).stage("one")
    steps = stage.steps().to_pylist()
    assert [row["learning_rate"] for row in steps] == used
    assert used[1] == [5e-3, 5e-4]
    assert all(row["weight_decay"] == [0.1, 0.0] for row in steps)
    assert all((row["beta1"], row["beta2"]) == ([0.7, 0.7], [0.9, 0.9]) for row in steps)
    groups = stage.meta["optimizers"][0]["groups"]
    assert [group["parameters"] for group in groups] == [
        ["first.weight", "second.weight"], ["first.bias", "second.bias"],
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["adamw", "adamw-fused", "adam", "amsgrad"])
def test_second_moments_are_bias_corrected(name: str, train: Callable, close: Callable) -> None:
    """v / (1 - b2^t), accumulated here from the gradients themselves."""
    moments: dict[str, torch.Tensor] = {}
    largest: dict[str, torch.Tensor] = {}

    def check(step: int, model: Member, optimizer: torch.optim.Optimizer) -> None:
        beta2, decay = optimizer.param_groups[0]["betas"][1], name == "adam"
        for key, p in model.named_parameters():
            gradient = p.grad.double() + (0.05 * before[key].double() if decay else 0)
            moments[key] = beta2 * moments.get(key, torch.zeros_like(gradient)) + (1 - beta2) * gradient**2
            largest[key] = torch.maximum(largest.get(key, moments[key]), moments[key])
            v = largest[key] if name == "amsgrad" else moments[key]
            close(second_moment(optimizer, p), v / (1 - beta2**step), relative=1e-5)
        before.update(_weights(model))

    model = LinearOnThreeAxes()
    before = _weights(model)
    train(model, steps=5, optimizer=OPTIMIZERS[name], watch=check)
    assert len(moments) == 4


def test_stored_factors_are_those_of_the_extended_moment(tmp_path: Path, train: Callable, close: Callable) -> None:
    found: dict[int, dict[str, torch.Tensor]] = {}

    def keep(step: int, model: Member, optimizer: torch.optim.Optimizer) -> None:
        found[step] = {name: second_moment(optimizer, p) for name, p in model.named_parameters()}

    train(LinearOnThreeAxes(), tmp_path, steps=12, watch=keep)
    stage = Ledger(tmp_path).stage("one")
    plan = SketchPlan.from_dict(stage.meta["plan"])
    for version, step in ((1, 4), (2, 12)):
        for weight in plan.weights:
            expected = lifted(*factor(whole_weight(weight, found[step])), floor=1 / step)
            for side in range(2):
                close(stage.factors(version)[weight.name][side], expected[side], relative=1e-6)


def test_sgd_rows_stay_raw_and_the_reason_is_stored(tmp_path: Path, train: Callable) -> None:
    train(LinearOnThreeAxes(), tmp_path, steps=6, optimizer=OPTIMIZERS["sgd-momentum"])
    stage = Ledger(tmp_path).stage("one")
    assert set(stage.steps()["version"].to_pylist()) == {0}
    assert stage.meta["versions"] == []
    assert "SGD keeps no second moments" in stage.meta["correction_unavailable"]
    assert stage.steps()["beta1"].to_pylist() == [[0.9]] * 6


def test_snapshots_inside_are_evenly_spread(tmp_path: Path, train: Callable) -> None:
    model, history = LinearOnThreeAxes(), {}
    train(model, tmp_path, steps=8, snapshots=3, total_steps=8,
          watch=lambda step, model, optimizer: history.update({step: _weights(model)}))  # fmt: skip
    stage = Ledger(tmp_path).stage("one")
    assert [(s["name"], s["step"]) for s in stage.meta["snapshots"]] == [
        ("start", 0), ("mid-1", 2), ("mid-2", 4), ("mid-3", 6), ("end", 8),
    ]  # fmt: skip
    for name, step in (("mid-1", 2), ("mid-2", 4), ("mid-3", 6), ("end", 8)):
        found = stage.snapshot(name)
        assert all(torch.equal(found[key], history[step][key]) for key in found)


@pytest.mark.parametrize(("wanted", "total"), [(0, 8), (3, None), (5, 2), (3, 1)])
def test_snapshots_fit_into_any_stage(wanted: int, total: int | None, tmp_path: Path, train: Callable) -> None:
    train(LinearOnThreeAxes(), tmp_path, steps=total or 3, snapshots=wanted, total_steps=total)
    snapshots = Ledger(tmp_path).stage("one").meta["snapshots"]
    assert (snapshots[0]["name"], snapshots[-1]["name"]) == ("start", "end")
    inside = [s["step"] for s in snapshots[1:-1]]
    assert inside == sorted(set(inside))
    assert all(0 < step < (total or 0) for step in inside)


def test_steps_skipped_by_a_gradient_scaler_are_no_steps(tmp_path: Path) -> None:
    """A scaler that finds an overflow does not call the optimizer; the count goes by executed updates."""
    model = LinearOnThreeAxes().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(0)
    with Recorder(tmp_path, stage="one", model=model, optimizer=optimizer):
        for executed in (True, False, True):
            inputs = model.inputs(generator, 4)
            model.losses([model(**inputs[0])], inputs).mean().backward()
            if executed:
                optimizer.step()
            optimizer.zero_grad()
    assert Ledger(tmp_path).stage("one").steps()["step"].to_pylist() == [1, 2]
