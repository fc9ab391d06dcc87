"""A gradient scaler: rows are of the loss before scaling, skipped steps are recorded as skipped and poison nothing."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tests.support import support
from trainer_attrib.capture.recorder import Recorder
from trainer_attrib.errors import ConfigurationError
from trainer_attrib.ledger.reader import Ledger, StageReader
from trainer_attrib.tap.plan import SketchPlan
from trainer_attrib.tap.projections import Projections
from trainer_attrib.testing.oracle import exact_sketches, example_gradients, project_gradient
from trainer_attrib.testing.zoo import LinearOnThreeAxes
from trainer_attrib.types import SketchConfig

SKETCH, BATCH = SketchConfig(rank=4, dtype="float32", correction="none"), 4
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-2),  # not called for a step that is skipped
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=1e-3, fused=True),  # called, with what the scaler found
}
SCALED = support("Precision and compilation", "autocast with GradScaler, plain loop (a CPU's scaler)")


class Loop:
    """A loop with a scaler whose scale moves at every update; some of its steps overflow."""

    def __init__(self, ledger: Path | None, optimizer: str, *, told: bool = True, accumulate: int = 1,
                 overflows: tuple[int, ...] = (), clip: bool = False, **options: Any) -> None:  # fmt: skip
        torch.manual_seed(0)
        self.model = LinearOnThreeAxes()
        self.optimizer = OPTIMIZERS[optimizer](self.model.parameters())
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, growth_interval=1)
        self.used: list[tuple[Any, list[Any]]] = []  # per executed step, the model and its batches
        self.losses: list[float] = []
        self.norms: list[float] = []
        self.sketch = options.pop("sketch", SKETCH)
        known = {"scaler": self.scaler} if told else {}
        self.recorder = ledger and Recorder(ledger, stage="one", model=self.model, optimizer=self.optimizer,
                                            sketch=self.sketch, strict=True, **known, **options)  # fmt: skip
        generator = torch.Generator().manual_seed(0)
        with self.recorder or nullcontext():
            for step in range(6):
                self._step(generator, accumulate, step in overflows, clip)

    def _step(self, generator: torch.Generator, accumulate: int, overflow: bool, clip: bool) -> None:
        before, batches, total = copy.deepcopy(self.model), [], 0.0
        for micro in range(accumulate):
            inputs = self.model.inputs(generator, BATCH)
            with self.recorder.batch() if self.recorder else nullcontext():
                loss = self.model.losses([self.model(**inputs[0])], inputs).mean() / accumulate
                broken = loss * float("inf") if overflow and micro == 0 else loss
                self.scaler.scale(broken).backward()
            if self.recorder:
                self.recorder.note_loss(loss)
            batches.append(inputs)
            total += loss.item()
        if clip:
            self.scaler.unscale_(self.optimizer)
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 0.1)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if not overflow:
            self.used.append((before, batches))
            self.losses.append(total)
            self.norms.append(float(torch.nn.utils.get_total_norm([p.grad for p in self.model.parameters()])))
        self.optimizer.zero_grad()


def rows_of(stage: StageReader) -> tuple[list[dict[str, Any]], torch.Tensor]:
    blocks = list(stage.rows())
    table = [row for block in blocks for row in block.table.to_pylist()]
    unit = torch.from_numpy(np.concatenate([block.sketches for block in blocks]).astype(np.float64))
    return table, unit * torch.tensor([row["norm"] for row in table]).double()[:, None]


def exact_rows(stage: StageReader, loop: Loop) -> torch.Tensor:
    found = []
    for version, (model, batches) in zip(stage.steps()["version"].to_pylist(), loop.used, strict=True):
        plan = SketchPlan.from_dict(stage.meta["plan"])
        projections = Projections(plan, model, stage.factors(version), version)
        found += [exact_sketches(model, inputs, projections) for inputs in batches]
    return torch.cat(found).double()


@SCALED
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("overflows", [(), (0, 3, 4)], ids=["no-overflow", "three-overflows"])
def test_rows_are_of_the_loss_before_scaling(
    optimizer: str, accumulate: int, overflows: tuple[int, ...], tmp_path: Path, close: Callable
) -> None:
    loop = Loop(tmp_path, optimizer, accumulate=accumulate, overflows=overflows)
    stage = Ledger(tmp_path).stage("one")
    table, found = rows_of(stage)
    close(found, exact_rows(stage, loop), relative=1e-5)
    assert {(r["denominator"], r["denominator_source"]) for r in table} == {(BATCH * accumulate, "assumed mean")}
    steps, skipped = stage.steps().to_pylist(), stage.skipped_steps().to_pylist()
    executed = 6 - len(overflows)
    assert loop.recorder is not None
    assert loop.recorder.step == executed == stage.count("steps")
    assert [row["step"] for row in steps] == list(range(1, executed + 1))
    assert sorted({row["step"] for row in table}) == list(range(1, executed + 1))
    assert [row["step"] for row in skipped] == ([0, 2, 2] if overflows else [])
    assert all((row["rows"], row["captured"], row["gradient_norm"]) == (0, False, None) for row in skipped)
    assert all(row["micro_batches"] == accumulate for row in steps + skipped)
    assert [row["loss"] for row in steps] == pytest.approx(loop.losses, rel=1e-6)
    assert [row["gradient_norm"] for row in steps] == pytest.approx(loop.norms, rel=1e-5)
    assert [row["audit_scale"] for row in steps] == pytest.approx([1] * executed, rel=1e-5)
    assert max(row["audit_residual"] for row in steps) < 1e-5


@SCALED
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_training_is_bit_identical_and_nothing_is_left_on_the_scaler(optimizer: str, tmp_path: Path) -> None:
    plain = Loop(None, optimizer, overflows=(1, 2))
    recorded = Loop(tmp_path, optimizer, overflows=(1, 2))
    for one, other in zip(plain.model.parameters(), recorded.model.parameters(), strict=True):
        assert torch.equal(one, other)
    assert recorded.scaler.state_dict() == plain.scaler.state_dict()
    assert vars(recorded.scaler).keys() == vars(plain.scaler).keys()
    assert not recorded.optimizer._optimizer_step_post_hooks


@SCALED
def test_the_audit_scale_is_the_clip_coefficient(tmp_path: Path) -> None:
    loop = Loop(tmp_path, "sgd", clip=True, overflows=(2,))
    assert loop.norms == pytest.approx([0.1] * 5, rel=1e-4)
    steps = Ledger(tmp_path).stage("one").steps().to_pylist()
    exact = [exact_sketches(m, b[0], _raw(tmp_path, m)).sum(0).norm() for m, b in loop.used]
    assert all(0.005 < row["audit_scale"] < 0.9 for row in steps)
    assert len(exact) == len(steps) == 5
    assert max(row["audit_residual"] for row in steps) < 1e-5


def _raw(ledger: Path, model: nn.Module) -> Projections:
    return Projections(SketchPlan.from_dict(Ledger(ledger).stage("one").meta["plan"]), model)


@SCALED
def test_an_overflow_does_not_reach_the_second_moments(tmp_path: Path, close: Callable) -> None:
    """Version 1 is folded in after the fourth executed step, whatever was skipped before."""
    sketch = SketchConfig(rank=4, dtype="float32")
    loop = Loop(tmp_path, "adamw-fused", overflows=(1,), sketch=sketch)
    stage = Ledger(tmp_path).stage("one")
    assert [(v["version"], v["after_step"]) for v in stage.meta["versions"]] == [(1, 4)]
    assert all(bool(torch.isfinite(side).all()) for pair in stage.factors(1).values() for side in pair)
    table, found = rows_of(stage)
    assert [row["version"] for row in table[::BATCH]] == [0, 0, 0, 0, 1]
    close(found, exact_rows(stage, loop), relative=1e-5)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_scaler_that_the_recorder_was_not_told_of_still_poisons_nothing(optimizer: str, tmp_path: Path) -> None:
    """What overflowed was thrown away before the next backward pass. Rows keep the scale, as the audit scale shows."""
    Loop(tmp_path, optimizer, told=False, overflows=(1,))
    stage = Ledger(tmp_path).stage("one")
    table, found = rows_of(stage)
    assert bool(torch.isfinite(found).all())
    assert len(table) == 5 * BATCH
    assert [row["step"] for row in table] == [step for step in range(1, 6) for _ in range(BATCH)]
    assert max(row["audit_residual"] for row in stage.steps().to_pylist()) < 1e-5


@SCALED
def test_a_measured_denominator_is_that_of_the_loss_before_scaling(
    tmp_path: Path, tiny_gpt2: Callable, token_rows: Callable, pad_collator: Callable
) -> None:
    def record(scaled: bool) -> list[dict[str, Any]]:
        model = tiny_gpt2().train()
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=scaled)
        batch = pad_collator()(token_rows(BATCH))
        ledger = tmp_path / str(scaled)
        with Recorder(ledger, stage="one", model=model, optimizer=optimizer, sketch=SKETCH, scaler=scaler):
            for _ in range(2):
                scaler.scale(model(**batch).loss).backward()
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
        return rows_of(Ledger(ledger).stage("one"))[0]

    scaled, plain = record(True), record(False)
    assert {row["denominator_source"] for row in scaled} == {"measured"}
    for found, row in zip(scaled, plain, strict=True):
        assert found["denominator"] == pytest.approx(row["denominator"], rel=1e-5)
        assert found["norm"] == pytest.approx(row["norm"], rel=1e-5)
        assert found["example"] == row["example"]


def losses_under_autocast(model: LinearOnThreeAxes, inputs: list[Any], dtype: torch.dtype) -> torch.Tensor:
    with torch.autocast("cpu", dtype=dtype):
        return model.losses([model(**inputs[0])], inputs)


@support("Precision and compilation", "autocast to bfloat16, plain loop")
@support("Precision and compilation", "autocast to float16 with GradScaler, plain loop (a CPU's scaler)")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rows_under_autocast_are_gradients_of_the_autocast_model(
    dtype: torch.dtype, tmp_path: Path, close: Callable
) -> None:
    """Against autograd of one example at a time under the same autocast, whose own rounding is the tolerance."""
    limit = torch.finfo(dtype).eps
    torch.manual_seed(0)
    model, generator = LinearOnThreeAxes().train(), torch.Generator().manual_seed(0)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, enabled=dtype == torch.float16)
    exact = []
    with Recorder(tmp_path, stage="one", model=model, optimizer=optimizer, sketch=SKETCH, scaler=scaler) as recorder:
        for _ in range(3):
            inputs = model.inputs(generator, BATCH)
            kept = copy.deepcopy(model)
            with recorder.batch(), torch.autocast("cpu", dtype=dtype):
                loss = model.losses([model(**inputs[0])], inputs).mean()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            exact += example_gradients(kept, functools.partial(losses_under_autocast, kept, inputs, dtype))
    stage, raw = Ledger(tmp_path).stage("one"), _raw(tmp_path, model)
    _, found = rows_of(stage)
    close(found, torch.stack([project_gradient(raw.plan, raw, g) for g in exact]).double(), relative=limit)
    assert recorder._tap.projections["first.weight"].left.dtype == torch.float32
    assert max(row["audit_residual"] for row in stage.steps().to_pylist()) < limit


def test_what_is_no_scaler_is_refused_at_once(tmp_path: Path) -> None:
    model = LinearOnThreeAxes()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ConfigurationError, match="has no scale"):
        Recorder(tmp_path, stage="one", model=model, optimizer=optimizer, scaler=65536.0)
