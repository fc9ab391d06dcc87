"""A clock that jumps changes neither what is recorded nor which stage comes after which."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from trainer_attrib import Ledger
from trainer_attrib.testing.zoo import LinearOnThreeAxes


@pytest.mark.parametrize("jump", [-1e8, -3600.0, 1e9], ids=["years back", "an hour back", "decades ahead"])
def test_a_clock_that_is_set_between_stages(
    jump: float, tmp_path: Path, train: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, now = LinearOnThreeAxes(), time.time
    train(model, tmp_path, "one")
    monkeypatch.setattr(time, "time", lambda: now() + jump)
    train(model, tmp_path, "two")
    monkeypatch.undo()
    train(model, tmp_path, "three")
    ledger = Ledger(tmp_path)
    assert [stage.name for stage in ledger.stages()] == ["one", "two", "three"]
    assert [stage.name for stage in ledger.lineage()] == ["one", "two", "three"]
    began = [stage.meta["began"] for stage in ledger.stages()]
    assert began == sorted({*began})  # what tells a recording from another of its name


def test_a_clock_that_jumps_while_parts_are_filled(
    tmp_path: Path, train: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    jumps, running = iter([0.0, 1e6, -1e6, 0.0, 1e9] * 1000), time.monotonic
    monkeypatch.setattr("trainer_attrib.ledger.writer.time.monotonic", lambda: running() + next(jumps))
    train(LinearOnThreeAxes(), tmp_path, steps=12)
    stage = Ledger(tmp_path).stage("one")
    assert stage.steps()["step"].to_pylist() == list(range(1, 13))
    assert (stage.count("rows"), stage.problems()) == (48, [])
    assert len(stage.parts()) > 1  # jumps ahead sealed some early
