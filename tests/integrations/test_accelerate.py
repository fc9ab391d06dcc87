"""accelerate's loop: a prepared optimizer that skips steps while gradients accumulate, a loader that moves batches."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch

pytest.importorskip("accelerate")

from tests.support import support
from trainer_attrib import Ledger

EXAMPLE = Path(__file__).parents[2] / "examples" / "accelerate_loop.py"


@support("Training loops", "a plain loop with accelerate, accumulating gradients")
def test_the_example_finds_the_wrong_labels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(EXAMPLE))["main"](str(tmp_path))
    assert int(capsys.readouterr().out.splitlines()[-1].split()[0]) >= 8  # of 10; 30 of all 600 are wrong
    stage = Ledger(tmp_path).stage("first")
    assert (stage.count("rows"), stage.count("examples")) == (6000, 600)
    assert stage.steps()["micro_batches"].to_pylist() == [2] * 100
    assert {d for block in stage.rows() for d in block.table["denominator"].to_pylist()} == {60.0}
    assert max(stage.steps()["audit_residual"].to_pylist()) < 1e-5
    assert torch.tensor(stage.steps()["audit_scale"].to_pylist()).sub(1).abs().max() < 1e-4
    assert len(EXAMPLE.read_text().splitlines()) <= 100
