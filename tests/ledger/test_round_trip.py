"""What is recorded is what is read: rows, steps, snapshots, the tree of stages, locally and on any file system."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from trainer_attrib.errors import ConfigurationError, LedgerNotFoundError, StageNotFoundError
from trainer_attrib.ledger.reader import Ledger
from trainer_attrib.ledger.row_codecs import row_codec
from trainer_attrib.ledger.schema import EXAMPLES, ROWS, STEPS, Block
from trainer_attrib.ledger.snapshots import combine, fingerprint_tensors
from trainer_attrib.ledger.storage import Storage
from trainer_attrib.ledger.writer import StageWriter
from trainer_attrib.testing.zoo import LinearOnThreeAxes, TiedEmbedding
from trainer_attrib.types import SketchConfig

ROWS_OF_3 = row_codec("float32", [[1, 1, 3]])


@pytest.fixture(params=["local", "memory"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A local directory and an object store."""
    return str(tmp_path / "ledger") if request.param == "local" else f"memory://ledger-{uuid.uuid4().hex}"


def _weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def test_recorded_stage_reads_back(place: str, train: Callable) -> None:
    model = LinearOnThreeAxes()
    start = _weights(model)
    train(model, place, steps=6, accumulate=2, snapshots=2, total_steps=6, sketch=SketchConfig(dtype="float32"))
    stage = Ledger(place).stage("one")
    assert (stage.meta["status"], stage.parent) == ("complete", None)
    assert [stage.count(kind) for kind in ("steps", "rows", "examples")] == [6, 48, 48]
    assert stage.steps()["step"].to_pylist() == [1, 2, 3, 4, 5, 6]
    assert stage.steps()["rows"].to_pylist() == [8] * 6
    blocks = list(stage.rows())
    names = [name for block in blocks for name in block.table["example"].to_pylist()]
    assert names == [f"{s}-{m}-{r}" for s in range(1, 7) for m in range(2) for r in range(4)]
    assert sorted(stage.examples()["example"].to_pylist()) == sorted(names)
    for block in blocks:
        assert block.sketches.shape == (block.table.num_rows, stage.width)
        assert np.allclose(np.linalg.norm(block.sketches, axis=1), 1, atol=1e-6)
    assert [s["name"] for s in stage.meta["snapshots"]] == ["start", "mid-1", "mid-2", "end"]
    for name, expected in (("start", start), ("end", _weights(model))):
        found = stage.snapshot(name)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert stage.problems() == []
    assert stage.bytes > 0


def test_tables_have_the_published_columns(tmp_path: Path, train: Callable) -> None:
    train(LinearOnThreeAxes(), tmp_path)
    stage = Ledger(tmp_path).stage("one")
    assert stage.steps().schema.equals(STEPS)
    assert stage.examples().schema.equals(EXAMPLES)
    assert next(stage.rows()).table.schema.equals(ROWS)


def test_children_find_their_parent_by_weights_and_share_its_end(place: str, train: Callable) -> None:
    """Two children branch from one parent; a third starts from other weights and is a root."""
    model = LinearOnThreeAxes()
    train(model, place, "pretrain")
    end = _weights(model)
    train(model, place, "sft", seed=1)
    model.load_state_dict(end)
    train(model, place, "dpo", seed=2)
    train(LinearOnThreeAxes(), place, "stranger")
    ledger = Ledger(place)
    assert {s.name: s.parent for s in ledger.stages()} == {
        "pretrain": None, "sft": "pretrain", "dpo": "pretrain", "stranger": None,
    }  # fmt: skip
    for child in ("sft", "dpo"):
        assert not Storage(place).exists(f"stages/{child}/snapshots/start.safetensors")
        start = ledger.stage(child).snapshot("start")
        assert all(torch.equal(start[name], end[name]) for name in end)
        assert ledger.stage(child).problems() == []
    names = [s.name for s in ledger.stages()]
    assert names.index("pretrain") < min(names.index("sft"), names.index("dpo"))


def test_lineage_follows_parents_to_the_given_weights(tmp_path: Path, train: Callable) -> None:
    model = LinearOnThreeAxes()
    for seed, name in enumerate(("one", "two", "three")):
        train(model, tmp_path, name, seed=seed)
    ledger = Ledger(tmp_path)
    assert [s.name for s in ledger.lineage()] == ["one", "two", "three"]
    middle = ledger.stage("two").meta["weights"]["end"]
    assert [s.name for s in ledger.lineage(middle)] == ["one", "two"]
    assert ledger.lineage(combine(fingerprint_tensors(_weights(model))))[-1].name == "three"
    with pytest.raises(StageNotFoundError, match="ended with these weights"):
        ledger.lineage("0" * 32)


def test_a_child_that_trains_more_weights_stores_its_own_start(tmp_path: Path, train: Callable) -> None:
    """The parent's end snapshot holds only what the parent trained."""
    model = LinearOnThreeAxes()
    model.first.requires_grad_(False)
    train(model, tmp_path, "head")
    model.first.requires_grad_(True)
    train(model, tmp_path, "all")
    child = Ledger(tmp_path).stage("all")
    assert child.parent == "head"
    assert child.snapshot("start").keys() == dict(model.named_parameters()).keys()


def test_tied_weights_are_stored_once(tmp_path: Path, train: Callable) -> None:
    train(TiedEmbedding(), tmp_path)
    assert sorted(Ledger(tmp_path).stage("one").snapshot("end")) == ["body.bias", "body.weight", "embedding.weight"]


def test_fingerprints_see_values_types_and_shapes_but_not_order() -> None:
    a = {"x": torch.arange(6.0), "y": torch.ones(2)}
    others = [
        {**a, "x": a["x"].reshape(2, 3)}, {**a, "x": a["x"].double()}, {**a, "x": a["x"] + 1e-6},
        {"x": a["x"], "z": a["y"]}, {"x": a["x"]},
    ]  # fmt: skip
    own = combine(fingerprint_tensors(a))
    assert own == combine(fingerprint_tensors(dict(reversed(a.items()))))
    assert all(combine(fingerprint_tensors(other)) != own for other in others)


def _block(step: int) -> Block:
    rows = [{"example": f"e{step}", "step": step, "row": 0, "norm": 1.0, "version": 0, "complete": True}]
    return Block({"step": step, "projected_weights": b"", "rows": 1}, rows, np.full((1, 3), step, np.float32))


def _stage_on_disk(root: Path) -> Storage:
    """The least that the reader needs beside the parts."""
    storage = Storage(root)
    meta = {
        "format": 1,
        "parent": None,
        "began": 0.0,
        "width": 3,
        "resumed": [],
        "processes": 1,
        "sharded": False,
        "snapshots": [],
        "versions": [],
        "sketch": {"dtype": "float32"},
    }
    storage.write_json("ledger.json", {"format": 1, "parameters": {}})
    storage.write_json("stages/s/stage.json", meta | {"weights": {}, "sketch": {"dtype": "float32"}})
    return storage


def _wait_for_parts(root: Path, count: int) -> None:
    deadline = time.monotonic() + 30
    while len(Ledger(root).stage("s").parts()) < count:
        assert time.monotonic() < deadline, "the writer did not seal its part"
        time.sleep(0.005)


def test_parts_are_immutable_and_the_reader_streams_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files_of: Callable
) -> None:
    """Every step becomes a part; later parts never touch earlier ones; blocks arrive one part at a time, in order."""
    monkeypatch.setattr("trainer_attrib.ledger.writer.ROLL_BYTES", 1)
    storage = _stage_on_disk(tmp_path)
    writer = StageWriter(storage, "stages/s", ROWS_OF_3)
    seen: dict[str, bytes] = {}
    for step in (1, 2, 3):
        writer.put(lambda step=step: _block(step))
        _wait_for_parts(tmp_path, step)
        now = files_of(tmp_path / "stages")
        sealed = {name: data for name, data in seen.items() if "part-" in name}
        assert all(now[name] == data for name, data in sealed.items())
        seen = now
    writer.close()
    stage = Ledger(tmp_path).stage("s")
    assert len(stage.parts()) == 3
    stream = stage.rows()
    assert next(stream).table["step"].to_pylist() == [1]
    assert [block.sketches[0, 0] for block in stream] == [2.0, 3.0]
    assert isinstance(next(stage.rows()).sketches[:], np.memmap)


def test_two_ranks_write_without_coordination(tmp_path: Path) -> None:
    storage = _stage_on_disk(tmp_path)
    writers = [StageWriter(storage, "stages/s", ROWS_OF_3, rank) for rank in (0, 1)]
    for rank, writer in enumerate(writers):
        writer.put(lambda rank=rank: _block(rank + 1))
    for writer in writers:
        writer.close()
    stage = Ledger(tmp_path).stage("s")
    assert sorted(block.table["step"][0].as_py() for block in stage.rows()) == [1, 2]
    assert stage.problems() == []


def test_a_crash_without_close_loses_only_the_unsealed_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = _stage_on_disk(tmp_path)
    writer = StageWriter(storage, "stages/s", ROWS_OF_3)
    monkeypatch.setattr("trainer_attrib.ledger.writer.ROLL_BYTES", 1)
    writer.put(lambda: _block(1))
    _wait_for_parts(tmp_path, 1)
    monkeypatch.setattr("trainer_attrib.ledger.writer.ROLL_BYTES", 1 << 30)
    writer.put(lambda: _block(2))  # never sealed: the process is gone
    stage = Ledger(tmp_path).stage("s")
    assert stage.steps()["step"].to_pylist() == [1]
    assert stage.problems() == []


@pytest.mark.parametrize("name", ["../outside", "a/b", "", ".hidden", "x" * 101, "a b", "..", 7, "new\n"])
def test_stage_names_cannot_leave_the_ledger(name: object, tmp_path: Path, train: Callable) -> None:
    with pytest.raises(ConfigurationError, match="is not a stage name"):
        train(LinearOnThreeAxes(), tmp_path / "ledger", name)
    assert list(tmp_path.iterdir()) == []


def test_reading_what_is_not_there_says_so(tmp_path: Path, train: Callable) -> None:
    with pytest.raises(LedgerNotFoundError, match="No ledger at"):
        Ledger(tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()
    train(LinearOnThreeAxes(), tmp_path)
    for name in ("two", "../one", ""):
        with pytest.raises(StageNotFoundError, match="recorded are"):
            Ledger(tmp_path).stage(name)
    with pytest.raises(StageNotFoundError, match="has no snapshot 'mid-9'"):
        Ledger(tmp_path).stage("one").snapshot("mid-9")
