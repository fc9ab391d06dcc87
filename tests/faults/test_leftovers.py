"""What a killed process leaves lying about: invisible to readers, gone once somebody goes on, never in the way."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.faults.verdict import leftovers
from trainer_attrib import Ledger, Recorder
from trainer_attrib.errors import StageNotFoundError
from trainer_attrib.ledger.journal import StageJournal
from trainer_attrib.ledger.links import describe_weights
from trainer_attrib.ledger.storage import Storage
from trainer_attrib.testing.zoo import LinearOnThreeAxes


class KilledError(BaseException):
    """Stands for SIGKILL: nothing in the package catches it."""


@pytest.fixture
def interrupted(tmp_path: Path, train: Callable) -> Path:
    """A stage that broke off after five steps, and half a file that its writer had begun."""

    def die(step: int, model: object, optimizer: object) -> None:
        if step == 5:
            raise KilledError

    with pytest.raises(KilledError):
        train(LinearOnThreeAxes(), tmp_path, watch=die)
    (tmp_path / "stages/one/rows/.writing-half").write_bytes(b"half a part")
    return tmp_path


def test_readers_do_not_see_half_a_file(interrupted: Path) -> None:
    stage = Ledger(interrupted).stage("one")
    assert stage.problems() == []
    assert Storage(interrupted).names("stages/one/rows") == ["part-0000-000000.f16", "part-0000-000000.parquet"]
    assert stage.count("rows") == 20


def test_going_on_with_the_stage_removes_it(interrupted: Path) -> None:

    model = LinearOnThreeAxes()
    optimizer = torch.optim.AdamW(model.parameters())
    assert leftovers(interrupted) != []
    Recorder(interrupted, stage="one", model=model, optimizer=optimizer).start(after_step=3).interrupt("enough")
    assert leftovers(interrupted) == []
    assert Ledger(interrupted).stage("one").steps()["step"].to_pylist() == [1, 2, 3]


def test_a_stage_that_died_being_opened_is_no_stage_and_begins_anew_under_its_name(
    tmp_path: Path, train: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(LinearOnThreeAxes(), tmp_path, "before")
    original = Storage.write_json

    def die_at_stage_json(storage: Storage, name: str, data: dict) -> None:
        if name == "stages/one/stage.json":
            raise KilledError
        original(storage, name, data)

    monkeypatch.setattr(Storage, "write_json", die_at_stage_json)
    with pytest.raises(KilledError):
        train(LinearOnThreeAxes(), tmp_path)
    monkeypatch.undo()
    with pytest.raises(StageNotFoundError, match=r"No stage 'one' in .*; recorded are \['before'\]"):
        Ledger(tmp_path).stage("one")
    train(LinearOnThreeAxes(), tmp_path)
    assert Ledger(tmp_path).stage("one").meta["status"] == "complete"
    assert Ledger(tmp_path).stage("one").problems() == []


def test_the_end_of_a_run_that_died_closing_it_is_forgotten_when_it_goes_on(tmp_path: Path) -> None:
    """The end snapshot was listed, the stage not closed; the run goes on from a checkpoint of that very step."""

    facts = {"width": 2, "plan": {"weights": []}, "trainable": ["w"], "sketch": {"dtype": "float32"}}
    storage, first, last = Storage(tmp_path), {"w": torch.ones(2, 2)}, {"w": torch.zeros(2, 2)}
    journal = StageJournal.begin(storage, "s", describe_weights(first), first, {"w"}, facts)
    journal.keep_start(first)
    journal.snapshot("end", 5, first)
    StageJournal.resume(storage, "s", 5, {"w"}, facts).end("complete", "", 7, last, describe_weights(last))
    stage = Ledger(tmp_path).stage("s")
    assert stage.snapshot_step("end") == 7
    assert torch.equal(stage.snapshot("end")["w"], last["w"])
    assert stage.problems() == []
