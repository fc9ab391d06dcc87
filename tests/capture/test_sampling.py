"""A sample keeps the rows of the same examples everywhere, and changes nothing else."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from trainer_attrib import Analyzer, Behavior, Ledger, Recorder, SketchConfig
from trainer_attrib.capture.example_ids import sampled

NAMES = [f"row-{i}" for i in range(24)]
PINNED = ["row-2", "row-4", "row-9", "row-16", "row-21", "row-23"]  # a quarter
FULL = {"rank": 4, "dtype": "float32"}


@pytest.mark.parametrize("share", [0.01, 0.1, 0.25, 0.5, 0.9])
@pytest.mark.parametrize("name", ["{}", "row-{}", "{:016x}"])
def test_a_sample_has_its_share_and_is_part_of_larger_ones(share: float, name: str) -> None:
    names = [name.format(i) for i in range(20_000)]
    kept = [n for n in names if sampled(n, share)]
    assert abs(len(kept) / len(names) - share) < 3 * (share * (1 - share) / len(names)) ** 0.5
    assert all(sampled(n, share + 0.05) for n in kept)
    assert all(sampled(n, 1.0) for n in names)


def test_the_choice_never_changes() -> None:
    """Pinned: stages recorded by different versions and processes must hold the same examples."""
    assert [n for n in NAMES if sampled(n, 0.25)] == PINNED


def train(ledger: Path, **sketch: object) -> nn.Module:
    """Two epochs over 24 examples in batches of 4, each epoch in an order of its own."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    x, y = torch.randn(24, 5), torch.randint(0, 3, (24,))
    with Recorder(ledger, stage="one", model=model, optimizer=optimizer, strict=True,
                  sketch=SketchConfig(**FULL | sketch)) as recorder:  # fmt: skip
        for epoch in range(2):
            recorder.epoch = epoch
            for rows in torch.randperm(24).split(4):
                names = [NAMES[i] for i in rows]
                with recorder.batch(names, sources=[f"from {n}" for n in names], texts=[f"text of {n}" for n in names]):
                    F.cross_entropy(model(x[rows]), y[rows]).backward()
                optimizer.step()
                optimizer.zero_grad()
    return model


def rows_of(ledger: Path) -> dict[tuple, tuple]:
    """(step, place in the batch) -> the row's table entry and sketch."""
    blocks = Ledger(ledger).stage("one").rows()
    pairs = [(row, s.tolist()) for b in blocks for row, s in zip(b.table.to_pylist(), b.sketches, strict=True)]
    return {(row["step"], row["row"]): (row, sketch) for row, sketch in pairs}


def test_sampled_rows_are_those_of_a_full_recording(tmp_path: Path) -> None:
    whole = train(tmp_path / "all")
    part = train(tmp_path / "part", sample=0.25)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), part.parameters(), strict=True))
    every, found = rows_of(tmp_path / "all"), rows_of(tmp_path / "part")
    assert found == {key: row for key, row in every.items() if row[0]["example"] in PINNED}
    for epoch in range(2):
        assert sorted(r["example"] for r, _ in found.values() if r["epoch"] == epoch) == sorted(PINNED)
    stage = Ledger(tmp_path / "part").stage("one")
    assert stage.meta["sketch"]["sample"] == 0.25
    described = {row["example"]: (row["source"], row["text"]) for row in stage.examples().to_pylist()}
    assert described == {name: (f"from {name}", f"text of {name}") for name in PINNED}
    counts = stage.steps()["rows"].to_pylist()
    assert sum(counts) == len(found)
    assert 0 in counts  # a step with no example of the sample


def test_the_audit_and_the_steps_still_see_every_example(tmp_path: Path) -> None:
    train(tmp_path / "all")
    train(tmp_path / "part", sample=0.25)
    whole, part = (Ledger(tmp_path / name).stage("one").steps().to_pydict() for name in ("all", "part"))
    assert whole.pop("rows") != part.pop("rows")
    assert whole == part
    assert max(part["audit_residual"]) < 1e-5


def test_influence_scores_the_sample_and_says_so(tmp_path: Path) -> None:
    model = train(tmp_path / "part", sample=0.25, every_n_steps=2, correction="none")
    query = Behavior.margin("margin", torch.randn(2, 5), torch.tensor([0, 1]))
    found = Analyzer(tmp_path / "part", model).influence([query])
    assert set(found.examples.ids) <= set(PINNED)
    assert any("rows of 25 % of the examples" in caveat for caveat in found.caveats)
    assert any("rows of one step in 2" in caveat for caveat in found.caveats)
    assert np.isfinite(found.scores).all()
    model = train(tmp_path / "all", correction="none")
    assert not any("rows of" in caveat for caveat in Analyzer(tmp_path / "all", model).influence([query]).caveats)
