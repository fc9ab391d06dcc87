"""A disk that is too slow: training waits for it, or rows are left out and that is said; memory is bounded."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from trainer_attrib import Analyzer, Behavior, Ledger, SketchConfig
from trainer_attrib.errors import ConfigurationError
from trainer_attrib.ledger.backlog import Backlog
from trainer_attrib.ledger.storage import Storage
from trainer_attrib.ledger.writer import StageWriter
from trainer_attrib.testing.zoo import LinearOnThreeAxes


def test_what_waits_is_bounded_by_its_bytes() -> None:
    backlog, go, done = Backlog(100), threading.Event(), list[int]()
    thread = threading.Thread(target=lambda: backlog.run(lambda work: work()))
    thread.start()
    assert backlog.fits(1000)  # alone, whatever its size
    for number in range(2):
        backlog.put(lambda n=number: (go.wait(10), done.append(n)), 45)
    assert not backlog.fits(1)
    third = threading.Thread(target=lambda: backlog.put(lambda: done.append(2), 45))
    third.start()
    third.join(0.1)
    assert third.is_alive()  # there is no room until the first is done, which is at work
    go.set()
    third.join(10)
    backlog.put(lambda: done.append(3), 1000)
    backlog.join()
    assert done == [0, 1, 2, 3]
    assert backlog.fits(1000)
    backlog.put(None)
    thread.join(10)
    assert not thread.is_alive()


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step is written at once, and takes 30 ms; room for two steps of 10 KB waits."""
    seal = StageWriter._seal

    def slowly(writer: StageWriter) -> None:
        time.sleep(0.03)
        seal(writer)

    monkeypatch.setattr(StageWriter, "_seal", slowly)
    monkeypatch.setattr("trainer_attrib.ledger.writer.ROLL_BYTES", 1)
    monkeypatch.setattr("trainer_attrib.ledger.writer.WAITING_BYTES", 8000)


def recorded(place: Path, train: Callable, when_behind: str) -> torch.nn.Module:
    torch.manual_seed(0)
    model = LinearOnThreeAxes()
    train(model, place, steps=20, sketch=SketchConfig(rank=4, correction="none", when_behind=when_behind))
    return model


def size_question() -> Behavior:
    return Behavior("size", [torch.ones(3, 21)], lambda model, items: model(torch.stack(items)).sum((1, 2)))


@pytest.mark.usefixtures("slow")
def test_training_waits_and_nothing_is_lost(tmp_path: Path, train: Callable) -> None:
    begun = time.monotonic()
    model = recorded(tmp_path, train, "wait")
    assert time.monotonic() - begun > 0.5
    stage = Ledger(tmp_path).stage("one")
    assert stage.count("rows") == 80
    assert all(stage.steps()["captured"].to_pylist())
    found = Analyzer(tmp_path, model).influence([size_question()], recipe="grad_cos")
    assert not any("too slow" in caveat for caveat in found.caveats)


@pytest.mark.usefixtures("slow")
def test_rows_are_left_out_and_counted(tmp_path: Path, train: Callable, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "trainer_attrib"):
        model = recorded(tmp_path / "skip", train, "skip")
    stage = Ledger(tmp_path / "skip").stage("one")
    steps = stage.steps().to_pylist()
    left_out = [step["step"] for step in steps if not step["captured"]]
    assert stage.meta["status"] == "complete"
    assert len(steps) == 20  # every step is there, with its loss and settings
    assert all(step["projected_weights"] and step["micro_batches"] for step in steps)
    assert 0 < len(left_out) < 20
    rows = {step for block in stage.rows() for step in block.table["step"].to_pylist()}
    assert rows == {*range(1, 21)} - {*left_out}
    said = f"the rows of {len(left_out)} steps"
    assert [record.levelname for record in caplog.records if "takes longer to write" in record.message] == ["WARNING"]
    assert any(said in record.message for record in caplog.records)
    found = Analyzer(tmp_path / "skip", model).influence([size_question()], recipe="grad_cos")
    assert any(said in caveat for caveat in found.caveats)


def test_the_choice_is_one_of_two_and_no_part_of_what_is_compared() -> None:
    assert SketchConfig(when_behind="skip") == SketchConfig()
    with pytest.raises(ConfigurationError, match="when_behind='never'"):
        SketchConfig(when_behind="never")


def test_a_writer_that_failed_never_blocks_training(tmp_path: Path, train: Callable, monkeypatch) -> None:
    """What waits is dropped after the fault."""
    monkeypatch.setattr("trainer_attrib.ledger.writer.ROLL_BYTES", 1)
    monkeypatch.setattr("trainer_attrib.ledger.writer.WAITING_BYTES", 1)
    write = Storage.write

    def fail(storage: Storage, name: str, data: bytes) -> dict:
        if "part-" in name:
            raise OSError(28, "No space left on device")
        return write(storage, name, data)

    monkeypatch.setattr(Storage, "write", fail)
    train(LinearOnThreeAxes(), tmp_path, steps=20)
    meta = Ledger(tmp_path).stage("one").meta
    assert meta["status"] == "incomplete"
    assert "No space left" in meta["reason"]
