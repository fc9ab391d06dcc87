"""A process of a training is killed: what was recorded stays readable, and nobody waits for the dead."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import trainer_attrib as ta
from tests.processes.conftest import ROOT
from tests.processes.train import BATCH, Classifier
from tests.processes.train_until_lost import KILLED, SEALED, STEPS, batch_of
from tests.support import support
from trainer_attrib.capture.recorder import Recorder
from trainer_attrib.cli import main
from trainer_attrib.ledger.reader import Ledger, StageReader

SCRIPT = Path(__file__).parent / "train_until_lost.py"


def train_until_lost(how: str, folder: Path, lost: int) -> tuple[StageReader, str]:
    """Both processes, one of which is killed; the stage, and what the other one said."""
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'integrations'}", "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, *map(str, (SCRIPT, how, folder / "ledger", folder / "store", rank, 2, lost))],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in (0, 1)
    ]  # fmt: skip
    try:
        said = [process.communicate(timeout=120)[0] for process in ranks]  # fails here if the survivor hangs
    finally:
        for process in ranks:
            process.kill()
    codes = [process.returncode for process in ranks]
    assert codes[lost] == -signal.SIGKILL, said[lost]
    assert codes[1 - lost] == 1, "the training's own error ends it, by no signal"
    assert "RuntimeError" in said[1 - lost]
    return Ledger(folder / "ledger").stage("one"), said[1 - lost]


def steps_by_rank(stage: StageReader) -> dict[int, set[int]]:
    found: dict[int, set[int]] = {0: set(), 1: set()}
    for block in stage.rows():
        for row in block.table.to_pylist():
            found[row["rank"]].add(row["step"])
    return found


@pytest.mark.parametrize(
    ("how", "lost"),
    [
        pytest.param("ddp", 1, marks=support("Many processes", "DDP: a process is killed, the parts of all stay")),
        pytest.param("fsdp", 0, marks=support("Many processes", "FSDP2: process 0 is killed, the parts of all stay")),
    ],
)
def test_the_parts_of_all_stay_readable(how: str, lost: int, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    stage, _ = train_until_lost(how, tmp_path, lost)
    assert not stage.problems()
    assert stage.meta["status"] == "incomplete"
    assert "RuntimeError" in stage.meta["reason"]
    assert stage.meta["reason"].startswith("rank 1 after step 9: ") == (lost == 0)
    survived = KILLED - 1
    assert steps_by_rank(stage) == {lost: {*range(1, SEALED + 1)}, 1 - lost: {*range(1, survived + 1)}}
    assert [step["rows"] for step in stage.steps().to_pylist()] == [BATCH] * SEALED + [BATCH // 2] * 3
    assert stage.steps_by_rank() == {lost: SEALED, 1 - lost: survived}
    middle = stage.snapshot("mid-1")
    assert {name: value.shape for name, value in middle.items()} == {
        name: value.shape for name, value in Classifier().state_dict().items()
    }
    assert main(["inspect", str(tmp_path / "ledger")]) == main(["verify", str(tmp_path / "ledger")]) == 0
    assert "incomplete" in capsys.readouterr().out
    if how == "ddp":
        _goes_on_in_one_process(tmp_path / "ledger", stage)


def _goes_on_in_one_process(ledger: Path, broken: StageReader) -> None:
    """From the snapshot after step 7, of which the killed process had sealed six: the analyzer answers, and says so."""
    model, after = Classifier(), broken.snapshot_step("mid-1")
    assert after == SEALED + 1
    model.load_state_dict(broken.snapshot("mid-1"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    recorder = Recorder(ledger, stage="one", model=model, optimizer=optimizer).start(after_step=after)
    for step in range(after + 1, STEPS + 1):
        ids, tokens, labels = batch_of(step, 0, 1)
        with recorder.batch(ids=ids):
            nn.functional.cross_entropy(model(tokens), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    recorder.finish()
    stage = Ledger(ledger).stage("one")
    assert stage.meta["status"] == "incomplete"
    assert "(1 of rank 1)" in stage.meta["reason"]
    seen = Counter(row["step"] for block in stage.rows() for row in block.table.to_pylist())
    assert seen == {step: BATCH // 2 if step == after else BATCH for step in range(1, STEPS + 1)}

    def right(model: nn.Module, batch: list[tuple[Tensor, Tensor]]) -> Tensor:
        return -nn.functional.cross_entropy(model(batch[0][0]), batch[0][1], reduction="none")

    _, tokens, labels = batch_of(1, 0, 1)
    behavior = ta.Behavior("right", [(tokens[:1], labels[:1])], right)
    influence = ta.Analyzer(ledger, model).influence([behavior], stages=["one"])
    assert {"5/0", "5/2", f"{after}/0"} <= {*influence.examples.ids}, "rows of both, also the survivor's last ones"
    assert f"{after}/2" not in {*influence.examples.ids}
    assert any("incomplete" in caveat and "rank 1" in caveat for caveat in influence.caveats)
