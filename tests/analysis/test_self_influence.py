"""Self-influence from captured rows: its formulas, and wrong labels that it finds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from trainer_attrib import Analyzer, Ledger, Recorder, SketchConfig
from trainer_attrib.errors import ConfigurationError

COUNT, WRONG = 60, (7, 23, 41)


@pytest.fixture
def recorded(tmp_path: Path) -> tuple[Analyzer, dict[str, list[np.ndarray]]]:
    """Two classes apart, three labels wrong; and every captured row by example."""
    torch.manual_seed(0)
    labels = torch.arange(COUNT) % 2
    x = torch.randn(COUNT, 4) + 2 * (2 * labels[:, None] - 1)
    labels[list(WRONG)] = 1 - labels[list(WRONG)]
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sketch = SketchConfig(rank=4, dtype="float32", correction="none")
    with Recorder(tmp_path, stage="only", model=model, optimizer=optimizer, sketch=sketch) as recorder:
        for _ in range(6):
            for rows in torch.randperm(COUNT).split(10):
                with recorder.batch(ids=[f"e{i:02}" for i in rows.tolist()]):
                    nn.functional.cross_entropy(model(x[rows]), labels[rows]).backward()
                optimizer.step()
                optimizer.zero_grad()
    found: dict[str, list[np.ndarray]] = {}
    for block in Ledger(tmp_path).stage("only").rows():
        for row, unit in zip(block.table.to_pylist(), block.sketches, strict=True):
            found.setdefault(row["example"], []).append(unit.astype(np.float64) * row["norm"])
    return Analyzer(tmp_path, model), found


def test_plain_is_the_mean_squared_norm(recorded: Any) -> None:
    analyzer, rows = recorded
    found = analyzer.self_influence(metric="plain")
    assert {row.example for row in found.rows} == set(rows)
    for row in found.rows:
        assert row.score == pytest.approx(np.mean([(g**2).sum() for g in rows[row.example]]), rel=1e-4)
        assert row.visits == 6
    assert [row.rank for row in found.rows] == list(range(1, COUNT + 1))
    assert all(a.score >= b.score for a, b in zip(found.rows, found.rows[1:], strict=False))


def test_fisher_whitens_layer_by_layer(recorded: Any) -> None:
    analyzer, rows = recorded
    everything = np.concatenate([np.stack(some) for some in rows.values()])
    stage = analyzer.lineage[0]
    from trainer_attrib.tap.plan import SketchPlan

    spans = SketchPlan.from_dict(stage.meta["plan"]).row_spans
    expected = dict.fromkeys(rows, 0.0)
    for span in spans:
        moment = everything[:, span].T @ everything[:, span] / len(everything)
        inverse = np.linalg.inv(moment + 0.1 * np.trace(moment) / len(moment) * np.eye(len(moment)))
        for name, some in rows.items():
            expected[name] += float(np.mean([g[span] @ inverse @ g[span] for g in some]))
    for row in analyzer.self_influence("only").rows:
        assert row.score == pytest.approx(expected[row.example], rel=1e-3)


@pytest.mark.parametrize("metric", ["fisher", "plain"])
def test_wrong_labels_come_first(metric: str, recorded: Any) -> None:
    found = recorded[0].self_influence(metric=metric)
    assert {row.example for row in found.top(3)} == {f"e{i:02}" for i in WRONG}
    assert found.to_table().num_rows == COUNT
    assert found.to_dict()["metric"] == metric
    assert found.top(1)[0].example in repr(found)
    assert found.blocks()
    pytest.importorskip("matplotlib")
    assert found.plot() is not None


def test_what_is_refused(recorded: Any) -> None:
    with pytest.raises(ConfigurationError, match="Unknown metric 'loud'"):
        recorded[0].self_influence(metric="loud")
