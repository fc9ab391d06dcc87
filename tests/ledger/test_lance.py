"""A stage's rows as a Lance table: the same bits, and indexes."""

from __future__ import annotations

import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tests.analysis.stages import margins, three_stages
from trainer_attrib import Analyzer, Ledger, SketchConfig
from trainer_attrib.analysis.influence import influence
from trainer_attrib.analysis.recipes.recipe import Question
from trainer_attrib.analysis.retrieval.where import Where
from trainer_attrib.errors import LedgerNotFoundError, MissingExtraError
from trainer_attrib.execution.runner import Serial
from trainer_attrib.ledger.lance_rows import LanceReader, LanceTables, export_lance
from trainer_attrib.testing.zoo import LinearOnThreeAxes


def test_what_is_missing_is_said(tmp_path: Path, train: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    train(LinearOnThreeAxes(), tmp_path)
    monkeypatch.setitem(sys.modules, "lance", None)
    with pytest.raises(MissingExtraError, match=r"trainer-attrib\[lance\]"):
        export_lance(Ledger(tmp_path).stage("one"), str(tmp_path / "rows.lance"))


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_rows_of_the_table_are_those_of_the_ledger(
    dtype: str, tmp_path: Path, train: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    lance = pytest.importorskip("lance")
    monkeypatch.setattr("trainer_attrib.ledger.writer.ROLL_BYTES", 2000)
    model = LinearOnThreeAxes()
    train(model, tmp_path, steps=12, sketch=SketchConfig(rank=4, dtype=dtype, correction="none"))
    stage, url = Ledger(tmp_path).stage("one"), str(tmp_path / "rows.lance")
    with pytest.raises(LedgerNotFoundError, match="No Lance table"):
        LanceReader(stage, url)
    for _ in range(2):  # exported again, it is replaced
        export_lance(stage, url)
    found = LanceReader(stage, url)
    assert len(list(stage.rows())) > 1
    for expected, block in zip(stage.rows(), pickle.loads(pickle.dumps(found)).rows(), strict=True):  # noqa: S301
        assert block.table.equals(expected.table)
        for key in (slice(None), np.array([2, 0, 2]), 1):
            assert np.array_equal(block.sketches[key], expected.sketches[key])
    sketches_QK = torch.randn(2, stage.width, generator=torch.Generator().manual_seed(0))
    named = type("Behavior", (), {"name": "any", "queries": ["a", "b"], "__len__": lambda self: 2})()
    lineage = SimpleNamespace(model=model, behaviors=[named], runner=Serial())
    for where in (None, Where(steps=(2, 3))):
        one, other = (
            influence(Question(lineage, [reader], {}, lambda *_: sketches_QK, where=where), "grad_cos")
            for reader in (stage, found)
        )
        assert np.array_equal(one.scores, other.scores)
    table = lance.dataset(url)
    assert table.to_table(filter="step = 2", columns=["example"]).num_rows == 4
    assert {tuple(index.field_names) for index in table.describe_indices()} == {("example",), ("step",), ("source",)}


def test_an_analyzer_scores_the_rows_of_tables(tmp_path: Path) -> None:
    pytest.importorskip("lance")
    run = three_stages(tmp_path / "ledger")
    analyzer, url = Analyzer(run.ledger, run.model), str(tmp_path / "second.lance")
    export_lance(analyzer.lineage[1], url)
    for keep in (None, 3):
        asked = {"recipe": "tracin", "keep": keep, "where": Where(steps=(5, 12))}
        expected = analyzer.influence([margins()], ["second", "third"], **asked)
        found = analyzer.influence([margins()], ["second", "third"], source=LanceTables({"second": url}), **asked)
        assert found.to_table().equals(expected.to_table())
        assert found.by_steps(2).equals(expected.by_steps(2))
