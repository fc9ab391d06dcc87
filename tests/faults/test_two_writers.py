"""Two processes that would write to the same place: the second one is told, and the first one's work stays whole."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch

from trainer_attrib import Ledger, Recorder
from trainer_attrib.errors import StageExistsError
from trainer_attrib.ledger.passes import PassFiles
from trainer_attrib.ledger.schema import EXAMPLES
from trainer_attrib.testing.zoo import LinearOnThreeAxes

_HOLD = """
import fcntl, sys
lock = open(sys.argv[1], "a")
fcntl.lockf(lock, fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""


@contextmanager
def another_process(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """One that is writing there now: it holds the lock as ``ledger.claims.Claim`` does, without importing torch."""
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-c", _HOLD, str(folder / ".writer")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


@pytest.fixture
def broken_off(tmp_path: Path, train: Callable) -> Path:
    """A stage that can be gone on with."""

    def stop(step: int, model: Any, optimizer: Any) -> None:
        if step == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(LinearOnThreeAxes(), tmp_path, watch=stop)
    return tmp_path


def recorder(ledger: Path, stage: str = "one") -> Recorder:
    model = LinearOnThreeAxes()
    return Recorder(ledger, stage=stage, model=model, optimizer=torch.optim.AdamW(model.parameters()))


def test_a_stage_is_recorded_by_one_process_at_a_time(broken_off: Path, files_of: Callable) -> None:
    with another_process(broken_off / "stages/one") as other:
        before = files_of(broken_off)
        with pytest.raises(StageExistsError, match=r"Another process is writing to .*stages/one now"):
            recorder(broken_off).start(after_step=2)
        assert files_of(broken_off) == before
        with recorder(broken_off, "beside"):  # other stages are nobody else's
            pass
        other.kill()
        other.wait()
        recorder(broken_off).start(after_step=2).finish()  # a lock does not outlive its process
    assert Ledger(broken_off).stage("one").meta["status"] == "complete"


def test_the_second_of_two_that_begin_the_same_stage_is_refused(tmp_path: Path) -> None:
    first, second = recorder(tmp_path), recorder(tmp_path)  # both found the name free
    first.start()
    with pytest.raises(StageExistsError, match="Stage 'one' is already recorded"):
        second.start()
    first.finish()
    assert Ledger(tmp_path).stage("one").meta["status"] == "complete"


def test_a_pass_is_made_by_one_process_at_a_time(tmp_path: Path, train: Callable) -> None:
    """Two would list the same rows one after the other."""
    train(LinearOnThreeAxes(), tmp_path)
    with another_process(tmp_path / "stages/one/passes/end"):
        files = PassFiles(Ledger(tmp_path).stage("one"), "end")
        with pytest.raises(StageExistsError, match=r"Another process is writing to .*passes/end now"):
            files.begin("data", 0, "float32", pa.Table.from_pylist([], EXAMPLES))
        assert files.meta == {}
