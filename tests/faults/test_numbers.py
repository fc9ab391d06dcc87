"""Losses and gradients that are no numbers are recorded as what they were, said once, and left out of answers."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.analysis.stages import Classifier, margins, stage_data
from trainer_attrib import Analyzer, Ledger, Recorder, SketchConfig

NAN, INF = float("nan"), float("inf")


def record(ledger: Path, factor: float, *, survives: bool, step_of_it: int = 10) -> Classifier:
    """Twelve steps, in one of which the first example's loss is multiplied; the loop may replace its gradient."""
    model, (x, y) = Classifier().double(), stage_data("first")
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    with Recorder(ledger, stage="one", model=model, optimizer=optimizer, sketch=SketchConfig(rank=4)) as recorder:
        for step in range(1, 13):
            optimizer.zero_grad()
            rows = (torch.arange(6) + 6 * step) % 24
            factors = torch.ones(6, dtype=torch.float64)
            factors[0] = factor if step == step_of_it else 1.0
            with recorder.batch([f"{step}/{row}" for row in range(6)], denominator=6):
                loss = (F.cross_entropy(model(x[rows]), y[rows], reduction="none") * factors).mean()
                loss.backward()
            recorder.note_loss(loss)
            if survives:
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                for parameter in model.parameters():
                    parameter.grad = torch.nan_to_num(parameter.grad, 0.0, 0.0, 0.0)
            optimizer.step()
    return model


@pytest.mark.parametrize("factor", [NAN, INF, 1e300], ids=["nan", "infinite", "exploding"])
def test_one_example_without_a_gradient_spoils_no_answer(
    factor: float, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = record(tmp_path, factor, survives=True)
    [said] = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert "step 10: the gradients of 1 examples are NaN or infinite (10/0, ...)" in said
    stage = Ledger(tmp_path).stage("one")
    assert (stage.meta["status"], stage.count("rows"), stage.problems()) == ("complete", 72, [])
    norms = {e: n for b in stage.rows() for e, n in zip(*(b.table[c].to_pylist() for c in ("example", "norm")))}  # noqa: B905
    assert [example for example, norm in norms.items() if not np.isfinite(norm)] == ["10/0"]
    for recipe in ("grad_dot", "trackstar"):
        found = Analyzer(tmp_path, model).influence([margins()], recipe=recipe)
        assert np.isfinite(found.scores).all()
        assert "10/0" not in found.examples.ids
        assert "stage 'one': 1 rows left out: their gradients were NaN or infinite" in found.caveats


def test_a_run_that_breaks_down_is_recorded_to_its_end(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The weights are NaN from then on."""
    record(tmp_path, NAN, survives=False, step_of_it=4)
    stage = Ledger(tmp_path).stage("one")
    assert (stage.meta["status"], stage.count("steps"), stage.problems()) == ("complete", 12, [])
    losses = stage.steps()["loss"].to_numpy()
    assert np.isfinite(losses[:3]).all()
    assert np.isnan(losses[3:]).all()
    assert sum("NaN or infinite" in record.getMessage() for record in caplog.records) == 1


def test_ids_may_be_given_twice(tmp_path: Path) -> None:
    """A sampler repeats examples to even out batches: each time they trained is a row, what they say is told once."""
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Recorder(tmp_path, stage="one", model=model, optimizer=optimizer, strict=True) as recorder:
        for step in range(2):
            with recorder.batch(["a", "a", "b"], texts=["x", "x", "y"], denominator=1):
                model(torch.ones(3, 3) * (step + 1)).sum().backward()
            optimizer.step()
    stage = Ledger(tmp_path).stage("one")
    assert [e for block in stage.rows() for e in block.table["example"].to_pylist()] == ["a", "a", "b"] * 2
    assert stage.examples().to_pylist() == [
        {"example": "a", "source": None, "text": "x"}, {"example": "b", "source": None, "text": "y"},
    ]  # fmt: skip
