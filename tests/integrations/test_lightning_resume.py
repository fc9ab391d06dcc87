"""A Lightning training that breaks off and resumes from a checkpoint leaves the rows of one that ran through."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from tests.integrations.test_lightning import BATCH, ROWS, SKETCH, data, modules, trainer_of
from tests.support import support
from trainer_attrib.errors import ConfigurationError, ModelMismatchError
from trainer_attrib.integrations.lightning import AttributionCallback
from trainer_attrib.ledger.reader import Ledger
from trainer_attrib.types import SketchConfig

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{start}")
    for start in (".*does not have many workers", ".*Starting from v1.9.0", ".*you used `ckpt_path`", "The dirpath has",
                  ".*Checkpoint directory", "Be aware that when using `ckpt_path`")
]  # fmt: skip
RESUMES = support("Training loops", "Lightning, checkpoint and resume")
PER_EPOCH = ROWS // BATCH


class Loader(DataLoader):
    """One that Lightning can resume in mid-epoch, as it resumes torchdata's."""

    def __init__(self, items: Any, **options: Any) -> None:
        super().__init__(items, **options)
        self.__dict__.update(done=0, passed_over=0)

    def __iter__(self) -> Iterator[Any]:
        first, self.passed_over = self.passed_over, 0
        for number, batch in enumerate(super().__iter__()):
            if number >= first:
                self.done = number + 1
                yield batch

    def state_dict(self) -> dict[str, int]:
        return {"done": self.done % len(self)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.passed_over = state["done"]


class BreaksOff(pl.Callback):
    """The machine dies in a batch."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
        if trainer.global_step == self.step:
            raise RuntimeError("the machine died")


def train(folder: Path, callbacks: list[Any], *, every: int = 1, resume: Path | None = None, epochs: int = 3) -> Any:
    torch.manual_seed(3)
    module = modules()()
    module.net.dropout.p = 0.0
    saver = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=every, save_top_k=-1, monitor=None)
    trainer = trainer_of("lightning.pytorch", folder, [*callbacks, saver], max_epochs=epochs, enable_checkpointing=True)
    loader = Loader(data().dataset, batch_size=BATCH)
    trainer.fit(module, loader, data(), ckpt_path=str(resume) if resume else None, weights_only=False)
    return trainer


def recording(ledger: Path, **options: Any) -> AttributionCallback:
    return AttributionCallback(ledger, stage="one", **{"sketch": SKETCH, "strict": True, **options})


def rows_of(ledger: Path, name: str = "one") -> dict[tuple[int, str], np.ndarray]:
    found: dict[tuple[int, str], np.ndarray] = {}
    for block in Ledger(ledger).stage(name).rows():
        for row, sketch in zip(block.table.to_pylist(), block.sketches, strict=True):
            key = (row["step"], row["example"])
            assert key not in found, "a row is there twice"
            found[key] = sketch * row["norm"]
    return found


@RESUMES
@pytest.mark.parametrize(
    ("checkpoint", "broken"), [(2, 4), (PER_EPOCH, 5), (4, 4)], ids=["mid", "epochs-end", "at-once"]
)
def test_a_resumed_training_has_the_rows_of_one_that_ran_through(checkpoint: int, broken: int, tmp_path: Path) -> None:
    train(tmp_path / "whole", [recording(tmp_path / "whole-ledger")])
    ledger = tmp_path / "ledger"
    with pytest.raises(RuntimeError, match="the machine died"):
        train(tmp_path / "broken", [recording(ledger), BreaksOff(broken)])
    assert Ledger(ledger).stage("one").count("steps") == broken
    trainer = train(tmp_path / "resumed", [recording(ledger)], resume=tmp_path / "broken" / f"step={checkpoint}.ckpt")
    expected, found = rows_of(tmp_path / "whole-ledger"), rows_of(ledger)
    assert found.keys() == expected.keys()
    assert len(found) == 3 * ROWS
    for key, row in expected.items():
        np.testing.assert_allclose(found[key], row, rtol=1e-4, atol=1e-6)
    stage = Ledger(ledger).stage("one")
    assert stage.meta["status"] == "complete"
    assert stage.steps()["step"].to_pylist() == list(range(1, trainer.global_step + 1))
    assert [s["step"] for s in stage.meta["snapshots"]] == [0, 2, 4, 7, 9]
    assert stage.meta["resumed"][0]["after_step"] == checkpoint


@RESUMES
def test_everything_before_a_checkpoint_is_sealed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the machine dies without a word: no part is sealed after the checkpoint."""
    ledger = tmp_path / "ledger"
    monkeypatch.setattr(AttributionCallback, "_stop", lambda *args: None)
    with pytest.raises(RuntimeError, match="the machine died"):
        train(tmp_path / "broken", [recording(ledger), BreaksOff(5)], every=4)
    monkeypatch.undo()
    assert Ledger(ledger).stage("one").count("steps") == 4
    train(tmp_path / "resumed", [recording(ledger)], resume=tmp_path / "broken" / "step=4.ckpt")
    assert len(rows_of(ledger)) == 3 * ROWS


@RESUMES
def test_a_checkpoint_made_without_the_callback_begins_a_stage(tmp_path: Path, caplog: Any) -> None:
    train(tmp_path / "plain", [], epochs=1)
    ledger = tmp_path / "ledger"
    train(tmp_path / "resumed", [recording(ledger)], resume=tmp_path / "plain" / "step=2.ckpt")
    assert "stage 'one' begins after step 2 of the training" in caplog.text
    stage = Ledger(ledger).stage("one")
    assert stage.steps()["step"].to_pylist() == list(range(1, 8))
    assert len(rows_of(ledger)) == 3 * ROWS - 2 * BATCH
    assert [s["step"] for s in stage.meta["snapshots"]] == [0, 2, 4, 5, 7]


def test_a_checkpoint_of_another_recording_is_refused_before_the_first_step(tmp_path: Path) -> None:
    for name in ("one", "other"):
        with pytest.raises(RuntimeError, match="the machine died"):
            train(tmp_path / name, [recording(tmp_path / f"{name}-ledger"), BreaksOff(3)])
    foreign = tmp_path / "other" / "step=2.ckpt"
    with pytest.raises(ConfigurationError, match="none of recording 'one'"):
        train(tmp_path / "resumed", [recording(tmp_path / "one-ledger")], resume=foreign)
    assert Ledger(tmp_path / "one-ledger").stage("one").count("steps") == 3


def test_other_settings_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="the machine died"):
        train(tmp_path / "one", [recording(tmp_path / "ledger"), BreaksOff(3)])
    other = SketchConfig(rank=5, dtype="float32", correction="none")
    with pytest.raises(ModelMismatchError, match="other layers or sketch settings"):
        train(tmp_path / "two", [recording(tmp_path / "ledger", sketch=other)], resume=tmp_path / "one" / "step=2.ckpt")


@RESUMES
def test_two_callbacks_have_states_of_their_own(tmp_path: Path) -> None:
    both = [recording(tmp_path / "first"), recording(tmp_path / "second")]
    assert both[0].state_key != both[1].state_key
    with pytest.raises(RuntimeError, match="the machine died"):
        train(tmp_path / "broken", [*both, BreaksOff(4)])
    saved = torch.load(tmp_path / "broken" / "step=2.ckpt", weights_only=True)["callbacks"]
    assert [saved[each.state_key]["step"] for each in both] == [2, 2]
    again = [recording(tmp_path / "first"), recording(tmp_path / "second")]
    train(tmp_path / "resumed", again, resume=tmp_path / "broken" / "step=2.ckpt")
    assert rows_of(tmp_path / "first").keys() == rows_of(tmp_path / "second").keys()
    assert len(rows_of(tmp_path / "second")) == 3 * ROWS
