"""An optimizer whose gradients are filled but which hardly ever steps: memory is bounded, rows are whole or none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from trainer_attrib.capture import window
from trainer_attrib.capture.recorder import Recorder
from trainer_attrib.ledger.reader import Ledger
from trainer_attrib.types import SketchConfig

RAW = SketchConfig(rank=4, dtype="float32", correction="none")
BATCH = 4


@pytest.mark.parametrize("discards", [False, True], ids=["steps-on-all", "discards-first"])
def test_what_waits_for_a_step_is_bounded(
    discards: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    """The step that used what was dropped has no rows; the next one, and all of the other optimizer, have theirs."""
    monkeypatch.setattr(window, "LIMIT", 2000)
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1))
    often, rarely = (torch.optim.SGD(part.parameters(), lr=1e-2) for part in (model[2], model[0]))
    most = 0
    with Recorder(tmp_path, stage="one", model=model, optimizer=[often, rarely], sketch=RAW, strict=True) as recorder:
        for turn in range(4 * window.PILE):
            last = turn >= 4 * window.PILE - 2
            if discards and last:
                rarely.zero_grad()
            with recorder.batch(denominator=BATCH):
                model(torch.randn(BATCH, 3)).square().mean().backward()
            often.step()
            often.zero_grad()
            most = max(most, sum(micro.record.size for micro in recorder._window.micro_batches))
            if last:
                rarely.step()
                rarely.zero_grad()
    each = 4 * 4 * BATCH  # numbers of the first layer's rows in a micro-batch
    assert 2000 < most <= 2000 + window.PILE * each
    assert caplog.text.count("wait for the optimizer of '0.weight' (and 0 other weights)") == 1
    stage = Ledger(tmp_path).stage("one")
    steps = stage.steps().to_pylist()
    assert [(row["captured"], row["rows"]) for row in steps if row["optimizer"] == 1] == [
        (True, BATCH) if discards else (False, 0), (True, BATCH),
    ]  # fmt: skip
    assert all(row["rows"] == BATCH for row in steps if row["optimizer"] == 0)
    assert max(row["audit_residual"] for row in steps if row["captured"]) < 1e-5


def test_a_long_window_within_the_limit_keeps_all_of_its_rows(tmp_path: Path) -> None:
    model = nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    count = 2 * window.PILE + 3
    with Recorder(tmp_path, stage="one", model=model, optimizer=optimizer, sketch=RAW, strict=True):
        for _ in range(count):
            (model(torch.randn(BATCH, 3)).square().mean() / count).backward()
        optimizer.step()
    (step,) = Ledger(tmp_path).stage("one").steps().to_pylist()
    assert (step["rows"], step["micro_batches"]) == (count * BATCH, count)
    assert step["audit_residual"] < 1e-5
    assert step["audit_scale"] == pytest.approx(1, rel=1e-4)
