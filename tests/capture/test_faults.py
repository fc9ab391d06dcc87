"""A capture fault never ends training, changes no weight, is reported once and leaves no hook; ``strict`` raises it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from trainer_attrib.capture.recorder import Recorder
from trainer_attrib.ledger.reader import Ledger
from trainer_attrib.ledger.storage import Storage
from trainer_attrib.testing.zoo import LinearOnThreeAxes


class InjectedError(RuntimeError):
    """Raised by what the tests break."""


def _broken(*args: object, **kwargs: object) -> Any:
    raise InjectedError("injected")


def _broken_after(calls: int, original: Callable[..., Any]) -> Callable[..., Any]:
    left = iter(range(calls))

    def sometimes(*args: Any, **kwargs: Any) -> Any:
        if next(left, None) is None:
            raise InjectedError("injected")
        return original(*args, **kwargs)

    return sometimes


def _full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk fails when the stage is being recorded, for parts only: ``stage.json`` can still be written."""
    original = Storage.write

    def write(storage: Storage, name: str, data: bytes) -> dict[str, Any]:
        if "/part-" in f"/{name}":
            raise OSError(28, "No space left on device")
        return original(storage, name, data)

    monkeypatch.setattr(Storage, "write", write)
    monkeypatch.setattr("trainer_attrib.ledger.writer.ROLL_BYTES", 1)


def _patch(name: str, calls: int = 0) -> Callable[[pytest.MonkeyPatch], None]:
    def apply(monkeypatch: pytest.MonkeyPatch) -> None:
        module, _, attribute = name.rpartition(".")
        target = pytest.importorskip(module) if module.islower() else getattr(
            pytest.importorskip(module.rpartition(".")[0]), module.rpartition(".")[2]
        )  # fmt: skip
        monkeypatch.setattr(target, attribute, _broken_after(calls, getattr(target, attribute)))

    return apply


FAULTS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "opening the batch": _patch("trainer_attrib.capture.batch.open_micro_batch"),
    "watching the output": _patch("trainer_attrib.capture.batch.watch_output", 2),
    "projecting the input": _patch("trainer_attrib.tap.layers._three_axes", 3),
    "adding a sketch": _patch("trainer_attrib.tap.record.sketch_examples", 3),
    "checking coverage": _patch("trainer_attrib.capture.coverage.check_coverage"),
    "projecting the weights": _patch("trainer_attrib.capture.step_recorder.StepRecorder._project", 3),
    "reading the optimizer": _patch("trainer_attrib.capture.stage_facts.group_settings", 1),
    "refreshing the second moment": _patch("trainer_attrib.ledger.journal.StageJournal.second_moment"),
    "making the rows": _patch("trainer_attrib.capture.window.unit_rows", 1),
    "storing a snapshot": _patch("trainer_attrib.ledger.snapshots.save_tensors", 1),
    "a full disk": _full_disk,
}
faults = pytest.mark.parametrize("name", FAULTS)


def _hooks(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Any]:
    hooks = [optimizer._optimizer_step_post_hooks, optimizer._optimizer_step_pre_hooks]
    for module in model.modules():
        hooks += [module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks]
    return [hook for registry in hooks for hook in registry.values()]


@faults
def test_training_goes_on_unchanged(
    name: str, tmp_path: Path, train: Callable, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    runs = []
    for recorded in (False, True):
        torch.manual_seed(1)
        model = LinearOnThreeAxes()
        if recorded:
            FAULTS[name](monkeypatch)
        options = {"snapshots": 1, "total_steps": 8} if recorded else {}
        runs.append(train(model, tmp_path if recorded else None, steps=8, accumulate=2, **options))
    plain, recorded = runs
    assert all(torch.equal(a, b) for a, b in zip(plain.model.parameters(), recorded.model.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(plain.losses, recorded.losses, strict=True))
    assert recorded.recorder.fault is not None
    assert _hooks(recorded.model, recorded.optimizer) == []
    assert len([r for r in caplog.records if r.levelno >= logging.WARNING]) == 1
    monkeypatch.undo()
    stage = Ledger(tmp_path).stage("one")
    assert stage.meta["status"] == "incomplete"
    assert "injected" in stage.meta["reason"] or "No space left" in stage.meta["reason"]
    assert stage.problems() == []
    assert sum(block.table.num_rows for block in stage.rows()) == stage.count("rows")


@faults
def test_strict_raises(name: str, tmp_path: Path, train: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    model = LinearOnThreeAxes()
    FAULTS[name](monkeypatch)
    with pytest.raises((InjectedError, OSError), match=r"injected|No space left"):
        train(model, tmp_path, steps=8, accumulate=2, strict=True, snapshots=1, total_steps=8)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    monkeypatch.undo()
    assert Ledger(tmp_path).stage("one").meta["status"] == "incomplete"


def test_a_fault_after_the_first_steps_keeps_what_was_sealed(
    tmp_path: Path, train: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    FAULTS["projecting the weights"](monkeypatch)  # two weights: the second step's second projection fails
    train(LinearOnThreeAxes(), tmp_path)
    stage = Ledger(tmp_path).stage("one")
    assert stage.steps()["step"].to_pylist() == [1]
    assert stage.count("rows") == 4


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit], ids=lambda error: error.__name__)
def test_a_broken_off_loop_leaves_an_incomplete_readable_stage(
    error: type[BaseException], tmp_path: Path, train: Callable
) -> None:
    def stop(step: int, model: Any, optimizer: Any) -> None:
        if step == 3:
            stopped.append(optimizer)
            raise error("stopped")

    model, stopped = LinearOnThreeAxes(), []
    with pytest.raises(error):
        train(model, tmp_path, watch=stop)
    assert _hooks(model, stopped[0]) == []
    stage = Ledger(tmp_path).stage("one")
    assert (stage.meta["status"], stage.meta["reason"]) == ("incomplete", f"{error.__name__}: stopped")
    assert stage.steps()["step"].to_pylist() == [1, 2, 3]
    assert stage.meta["weights"]["end"] is None
    assert stage.problems() == []


def test_finishing_twice_or_after_an_interruption_changes_nothing(tmp_path: Path, files_of: Callable) -> None:
    model = LinearOnThreeAxes()
    recorder = Recorder(tmp_path, stage="one", model=model, optimizer=torch.optim.SGD(model.parameters())).start()
    recorder.interrupt("stopped by hand")
    before = files_of(tmp_path)
    recorder.finish()
    recorder.interrupt("again")
    assert files_of(tmp_path) == before
    assert Ledger(tmp_path).stage("one").meta["reason"] == "stopped by hand"
