"""A stage that is resumed from a checkpoint keeps every row that trained the model, once, and loses none on disk."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from trainer_attrib.errors import ModelMismatchError, StageExistsError, StageNotFoundError
from trainer_attrib.ledger.journal import StageJournal, check_place
from trainer_attrib.ledger.links import describe_weights
from trainer_attrib.ledger.reader import Ledger
from trainer_attrib.ledger.row_codecs import row_codec
from trainer_attrib.ledger.schema import Block
from trainer_attrib.ledger.storage import Storage
from trainer_attrib.ledger.writer import StageWriter

WEIGHTS = {"w": torch.ones(2, 2)}
DESCRIBED = describe_weights(WEIGHTS)
FACTS = {"width": 2, "plan": {"weights": []}, "trainable": ["w"], "sketch": {"dtype": "float32"}}


def block(step: int, attempt: int) -> Block:
    row = {"example": f"{attempt}/{step}", "step": step, "version": 0, "norm": 1.0, "complete": True}
    return Block({"step": step, "projected_weights": b""}, [row], np.full((1, 2), step, np.float32), [])


def write(storage: Storage, steps: range, attempt: int, roll: int = 1) -> None:
    for start in range(steps.start, steps.stop, roll):  # a part every `roll` steps
        writer = StageWriter(storage, "stages/s", row_codec("float32", [[1, 1, 2]]))
        for step in range(start, min(start + roll, steps.stop)):
            writer.put(lambda step=step: block(step, attempt))
        writer.close()


@pytest.fixture
def storage(tmp_path):
    """A stage that recorded steps 1 to 5 in parts of two, then broke off."""
    storage = Storage(tmp_path)
    journal = StageJournal.begin(storage, "s", DESCRIBED, WEIGHTS, {"w"}, FACTS)
    journal.keep_start(WEIGHTS)
    write(storage, range(1, 6), attempt=1, roll=2)
    journal.snapshot("mid-1", 2, WEIGHTS)
    journal.snapshot("mid-2", 4, WEIGHTS)
    journal.end("incomplete", "KeyboardInterrupt", 5, None)
    return storage


def contents(storage: Storage) -> list[str]:
    stage = Ledger(storage.url).stage("s")
    rows = [example for rows in stage.rows() for example in rows.table["example"].to_pylist()]
    sketches = [int(value) for rows in stage.rows() for value in rows.sketches[:, 0]]
    assert stage.count("rows") == len(rows) == stage.count("steps")
    assert sketches == [int(row.split("/")[1]) for row in rows]
    assert stage.steps()["step"].to_pylist() == sorted(sketches)
    assert stage.problems() == []
    return rows


def test_steps_after_the_checkpoint_are_superseded(storage):
    StageJournal.resume(storage, "s", 3, {"w"}, FACTS)
    write(storage, range(4, 7), attempt=2)
    assert contents(storage) == ["1/1", "1/2", "1/3", "2/4", "2/5", "2/6"]


def test_a_stage_may_break_off_and_be_resumed_again(storage):
    StageJournal.resume(storage, "s", 4, {"w"}, FACTS).end("incomplete", "killed", 4, None)
    write(storage, range(5, 8), attempt=2)
    StageJournal.resume(storage, "s", 2, {"w"}, FACTS)
    write(storage, range(3, 6), attempt=3)
    assert contents(storage) == ["1/1", "1/2", "3/3", "3/4", "3/5"]


def test_nothing_sealed_is_overwritten(storage, tmp_path, files_of):
    before = {name: data for name, data in files_of(tmp_path).items() if "part-" in name}
    StageJournal.resume(storage, "s", 1, {"w"}, FACTS)
    write(storage, range(2, 4), attempt=2)
    after = files_of(tmp_path)
    assert all(after[name] == data for name, data in before.items())


def test_snapshots_of_superseded_steps_are_forgotten(storage):
    journal = StageJournal.resume(storage, "s", 3, {"w"}, FACTS)
    assert [entry["name"] for entry in journal.meta["snapshots"]] == ["start", "mid-1"]
    journal.snapshot("mid-2", 4, WEIGHTS)
    journal.end("complete", "", 6, WEIGHTS, DESCRIBED)
    stage = Ledger(storage.url).stage("s")
    assert [entry["name"] for entry in stage.meta["snapshots"]] == ["start", "mid-1", "mid-2", "end"]
    assert stage.problems() == []


def test_what_cannot_be_resumed_is_refused(storage):
    with pytest.raises(StageNotFoundError):
        StageJournal.resume(storage, "other", 1, {"w"}, FACTS)
    with pytest.raises(ModelMismatchError, match="other layers or sketch settings"):
        StageJournal.resume(storage, "s", 1, {"w"}, FACTS | {"plan": {"weights": ["another"]}})
    with pytest.raises(ModelMismatchError, match="same settings"):
        StageJournal.resume(storage, "s", 1, {"w"}, FACTS | {"sketch": {"dtype": "float32", "sample": 0.5}})
    with pytest.raises(StageExistsError, match="resume it from a checkpoint"):
        StageJournal.begin(storage, "s", DESCRIBED, WEIGHTS, {"w"}, FACTS)
    StageJournal.resume(storage, "s", 3, {"w"}, FACTS).end("complete", "", 5, WEIGHTS, DESCRIBED)
    with pytest.raises(StageExistsError):
        StageJournal.resume(storage, "s", 3, {"w"}, FACTS)
    with pytest.raises(StageExistsError):
        check_place(storage.url, "s")
