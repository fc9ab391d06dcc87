"""A disk that is full, read-only or taken away: training goes on, the stage says why it is incomplete, and what was
sealed can be read."""

from __future__ import annotations

import errno
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from trainer_attrib import Ledger, Recorder
from trainer_attrib.errors import LedgerNotWritableError
from trainer_attrib.testing.zoo import LinearOnThreeAxes


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, of 500 KB."""
    place = tmp_path / "disk"
    place.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=500k", "tmpfs", place]).returncode:
        pytest.skip("nothing can be mounted here")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


def until_sealed(ledger: Path) -> None:
    """Wait for the writer's thread to seal a part."""
    for _ in range(500):
        if (ledger / "stages/one/manifest-0000.json").exists():
            return
        time.sleep(0.01)
    raise AssertionError("no part was sealed in five seconds")


def unrecorded(train: Callable, steps: int) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return train(LinearOnThreeAxes(), steps=steps).losses


def test_a_disk_that_fills_up(disk: Path, train: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer_attrib.ledger.writer.ROLL_BYTES", 4000)
    torch.manual_seed(0)
    run = train(LinearOnThreeAxes(), disk / "ledger", steps=150)
    assert isinstance(run.recorder.fault, LedgerNotWritableError)
    assert "No space left on device" in str(run.recorder.fault)
    assert all(torch.equal(a, b) for a, b in zip(run.losses, unrecorded(train, 150), strict=True))
    stage = Ledger(disk / "ledger").stage("one")
    assert stage.meta["status"] == "incomplete"
    assert "LedgerNotWritableError" in stage.meta["reason"]
    assert "No space left on device" in stage.meta["reason"]
    assert stage.problems() == []
    assert sum(block.table.num_rows for block in stage.rows()) == stage.count("rows") >= 16


def test_a_directory_that_is_read_only_is_refused_before_training(disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    model = LinearOnThreeAxes()
    with pytest.raises(LedgerNotWritableError, match=r"Cannot write .*disk.*: Read-only file system"):
        Recorder(disk / "ledger", stage="one", model=model, optimizer=torch.optim.SGD(model.parameters()))


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.EIO, errno.ENOSPC, errno.EDQUOT])
def test_whatever_the_system_says_of_writing_is_told(
    number: int, tmp_path: Path, train: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Permissions may be lost at any step; injected, since nobody takes them from root."""
    made = tempfile.mkstemp

    def lose(step: int, model: object, optimizer: object) -> None:
        if step == 3:
            until_sealed(tmp_path)
            monkeypatch.setattr(tempfile, "mkstemp", refuse)

    def refuse(*args: object, **kwargs: object) -> tuple[int, str]:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("trainer_attrib.ledger.writer.ROLL_BYTES", 1)
    run = train(LinearOnThreeAxes(), tmp_path, steps=6, watch=lose)
    monkeypatch.setattr(tempfile, "mkstemp", made)
    assert isinstance(run.recorder.fault, LedgerNotWritableError)
    assert f"Cannot write {tmp_path}" in str(run.recorder.fault)
    assert os.strerror(number) in str(run.recorder.fault)
    assert len(run.losses) == 6
    stage = Ledger(tmp_path).stage("one")
    assert stage.problems() == []
    assert 1 <= stage.count("steps") <= 3
