"""Stages in which no example has more than one row are scanned without counting first, with the same answers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.analysis.stages import Classifier, margins
from tests.analysis.test_retrieval import kept, parts_of, ranked
from trainer_attrib import Analyzer, Recorder, SketchConfig
from trainer_attrib.analysis.retrieval.ends import Ends
from trainer_attrib.analysis.retrieval.plan import Plan
from trainer_attrib.analysis.retrieval.where import Where
from trainer_attrib.errors import CorruptPartError
from trainer_attrib.ledger import writer
from trainer_attrib.ledger.reader import Ledger, StageReader


def record(folder: Path, monkeypatch: pytest.MonkeyPatch, twice: bool = False) -> Analyzer:
    """Eight steps of six examples of three sources, every step a part of its own."""
    monkeypatch.setattr(writer, "ROLL_BYTES", 1)
    torch.manual_seed(0)
    model = Classifier().double()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    sketch = SketchConfig(rank=4, dtype="float32")
    with Recorder(folder, stage="one", model=model, optimizer=optimizer, sketch=sketch) as recorder:
        for step in range(8):
            names = [f"e{6 * step + row}" for row in range(6)]
            if twice and step == 7:
                names[0] = "e3"
            optimizer.zero_grad()
            with recorder.batch(names, sources=[None, "b", "c"] * 2, texts=names, denominator=6):
                F.cross_entropy(model(torch.randn(6, 6).double()), torch.arange(6) % 3).backward()
            optimizer.step()
    return Analyzer(folder, model)


def counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let readers not know what they know."""
    monkeypatch.setattr(StageReader, "visited_once", lambda *_: False)


@pytest.mark.parametrize("recipe", ["trackstar", "tracin"])
@pytest.mark.parametrize("where", [None, Where(sources=["b"], steps=(2, 7)), Where(ids=["e1", "e40"])])
@pytest.mark.parametrize("keep", [None, 4])
def test_what_was_not_counted_has_the_same_answers(tmp_path, monkeypatch, recipe, where, keep):
    analyzer = record(tmp_path / "ledger", monkeypatch)
    assert analyzer.lineage[0].visited_once(analyzer.lineage[0].row_parts())
    asked = {"recipe": recipe, "where": where, "keep": keep}
    found = analyzer.influence([margins()], **asked)
    counted(monkeypatch)
    expected = analyzer.influence([margins()], **asked)
    assert found.to_table().num_rows > 0
    for told in ("to_table", "by_source", "by_steps"):
        assert getattr(found, told)().equals(getattr(expected, told)())
    assert found.caveats == expected.caveats


def test_one_example_that_comes_again_makes_a_difference(tmp_path, monkeypatch):
    analyzer = record(tmp_path / "ledger", monkeypatch, twice=True)
    assert not analyzer.lineage[0].visited_once(analyzer.lineage[0].row_parts())
    ends, dense = (analyzer.influence([margins()], recipe="grad_cos", keep=keep) for keep in (47, None))
    assert ends.top(47).equals(dense.top(47))
    assert ends.examples.ids.tolist().count("e3") == 1


@pytest.mark.parametrize("keep", [None, 3])
def test_parts_that_are_sealed_meanwhile_are_not_seen(tmp_path, monkeypatch, keep):
    """A stage may be asked while it is recorded, and its next epoch begin between two looks at it."""
    analyzer = record(tmp_path / "ledger", monkeypatch, twice=True)
    stage, parts = analyzer.lineage[0], analyzer.lineage[0].row_parts()
    listed = iter([parts[:7]])
    monkeypatch.setattr(stage, "row_parts", lambda: next(listed, parts))
    found = analyzer.influence([margins()], recipe="grad_cos", keep=keep, controls=())
    assert len(set(found.examples.ids.tolist())) == len(found.examples) <= 42
    assert found.by_steps([1]).to_pylist()[0]["count"] == 42


def test_nothing_is_read_twice(tmp_path, monkeypatch):
    analyzer, read = record(tmp_path / "ledger", monkeypatch), []
    original = StageReader.row_block
    monkeypatch.setattr(StageReader, "row_block", lambda *given: read.append(1) or original(*given))
    analyzer.influence([margins()], recipe="grad_cos", keep=4)
    assert len(read) == 8
    counted(monkeypatch)
    analyzer.influence([margins()], recipe="grad_cos", keep=4)
    assert len(read) == 8 + 16


def test_what_is_held_does_not_grow_with_the_examples(monkeypatch):
    """Ids and steps of what fell out of the ends are forgotten."""
    most, forget = [0], Ends._forget

    def watched(ends: Ends) -> None:
        forget(ends)
        most[0] = max(most[0], len(ends._ids))

    monkeypatch.setattr(Ends, "_forget", watched)
    parts = list(parts_of(examples=30_000, visits=1, parts=300))
    found, _ = kept(parts, 20, False)
    assert most[0] < 5_000
    scores = np.concatenate([scores for _, scores in parts], 1)
    names = np.concatenate([table["example"].to_numpy(zero_copy_only=False) for table, _ in parts]).astype(str)
    steps = dict(zip(names.tolist(), range(1, 1 + len(names)), strict=True))
    for query, row in enumerate(scores):
        assert [i for i, _ in ranked(found, query, 20, True)] == names[np.argsort(-row)[:20]].tolist()
        assert [i for i, _ in ranked(found, query, 20, False)] == names[np.argsort(row)[:20]].tolist()
    assert all(steps[i] == step for i, step in zip(found.ids, found.last_steps, strict=True))


def test_a_plan_of_examples_in_one_part_each_holds_none_of_them():
    plan = Plan.of([], [])
    assert (plan.open, len(plan.counts), plan.groups(5)) == (0, 0, [slice(0, 5)])


def test_rows_of_a_step_that_is_not_told_of_are_named(tmp_path, monkeypatch):
    analyzer = record(tmp_path / "ledger", monkeypatch)
    steps = StageReader.steps
    monkeypatch.setattr(StageReader, "steps", lambda *given: steps(*given).slice(0, 5))
    with pytest.raises(CorruptPartError, match=r"rows of step 6, and the last step told of is 5"):
        analyzer.influence([margins()], recipe="tracin")
    assert len(analyzer.influence([margins()], recipe="grad_cos").examples) == 48  # needs no learning rate
    assert Ledger(tmp_path / "ledger").stage("one").count("rows") == 48


def test_chunks_of_half_precision_are_written_over_and_nobody_keeps_them(tmp_path, monkeypatch):
    """Chunks of 64 rows share their memory, 200 rows at once do not: who keeps a chunk, or changes it, tells others."""
    model = Classifier().double()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    torch.manual_seed(0)
    sketch = SketchConfig(rank=4, correction="none")
    with Recorder(tmp_path, stage="one", model=model, optimizer=optimizer, sketch=sketch) as recorder:
        for step in range(4):
            optimizer.zero_grad()
            with recorder.batch([f"e{50 * step + row}" for row in range(50)], denominator=50):
                F.cross_entropy(model(torch.randn(50, 6).double()), torch.arange(50) % 3).backward()
            optimizer.step()
    analyzer = Analyzer(tmp_path, model)
    assert [part.entry["rows"] for part in analyzer.lineage[0].row_parts()] == [200]

    def answers() -> dict[str, np.ndarray]:
        recipes = ("trackstar", "fisher", "tracin", "grad_dot", "grad_cos")
        scores = {recipe: analyzer.influence([margins()], recipe=recipe).scores for recipe in recipes}
        own = {metric: analyzer.self_influence("one", metric=metric).to_table() for metric in ("fisher", "plain")}
        return scores | {m: np.array([r["score"] for r in t.sort_by("example").to_pylist()]) for m, t in own.items()}

    whole = answers()
    monkeypatch.setattr("trainer_attrib.analysis.recipes.streamed.CHUNK_BYTES", 1)
    for name, found in answers().items():
        assert found.size >= 200
        np.testing.assert_allclose(found, whole[name], rtol=1e-4, atol=1e-6 * np.abs(whole[name]).max(), err_msg=name)
