"""A run that breaks off and resumes from a checkpoint leaves the same rows as one that ran through."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest

pytest.importorskip("transformers")

from datasets import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from tests.support import support
from trainer_attrib import Analyzer, Ledger, SketchConfig
from trainer_attrib.errors import ConfigurationError
from trainer_attrib.integrations.huggingface import AttributionCallback
from trainer_attrib_integrations import sidecar

RAW = SketchConfig(rank=4, correction="none", dtype="float32")


class BreaksOff(TrainerCallback):
    """The machine dies after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.fixture
def trainer_for(tmp_path, tiny_gpt2, token_rows, pad_collator):
    """Makes the same trainer each time: 3 epochs of 3 steps in shuffled order, a checkpoint every 2 steps."""
    start = tiny_gpt2()
    rows = [{**row, "id": f"row-{i}"} for i, row in enumerate(token_rows(12))]

    def make(name: str, callbacks: list[Any]) -> Trainer:
        arguments = TrainingArguments(
            str(tmp_path / name), per_device_train_batch_size=4, num_train_epochs=3, learning_rate=1e-3, use_cpu=True,
            report_to="none", save_strategy="steps", save_steps=2, logging_strategy="no", disable_tqdm=True, seed=5,
            dataloader_pin_memory=False,
        )  # fmt: skip
        return Trainer(
            model=copy.deepcopy(start),
            args=arguments,
            train_dataset=Dataset.from_list(rows),
            data_collator=pad_collator(),
            callbacks=callbacks,
        )

    return make


def rows_of(ledger) -> dict[tuple, Any]:
    stage = Ledger(ledger).stage("one")
    found: dict[tuple, Any] = {}
    for block in stage.rows():
        for row, sketch in zip(block.table.to_pylist(), block.sketches, strict=True):
            key = (row["step"], row["row"], row["example"])
            assert key not in found, "a row is there twice"
            found[key] = (row["norm"], sketch.tolist())
    return found


@support("Training loops", "Hugging Face Trainer, checkpoint and resume")
@support("Data", "resume in mid-epoch")
def test_a_resumed_run_has_the_rows_of_one_that_ran_through(tmp_path, trainer_for):
    whole = trainer_for("whole", [AttributionCallback(tmp_path / "whole-ledger", stage="one", sketch=RAW)])
    whole.train()
    ledger = tmp_path / "ledger"
    broken = trainer_for("broken", [AttributionCallback(ledger, stage="one", sketch=RAW), BreaksOff(5)])
    with pytest.raises(KeyboardInterrupt):
        broken.train()
    assert Ledger(ledger).stage("one").count("steps") == 5  # one more than the checkpoint knows of
    resumed = trainer_for("broken", [AttributionCallback(ledger, stage="one", sketch=RAW, strict=True)])
    resumed.train(resume_from_checkpoint=True)
    expected, found = rows_of(tmp_path / "whole-ledger"), rows_of(ledger)
    assert found.keys() == expected.keys()
    assert len(found) == 36
    for key, (norm, sketch) in expected.items():
        assert found[key][0] == pytest.approx(norm, rel=1e-5)
        assert found[key][1] == pytest.approx(sketch, abs=1e-5)
    stage = Ledger(ledger).stage("one")
    assert stage.meta["status"] == "complete"
    assert stage.steps()["step"].to_pylist() == list(range(1, 10))
    assert sorted(stage.examples()["example"].to_pylist()) == sorted(f"row-{i}" for i in range(12))
    assert [s["step"] for s in stage.meta["snapshots"]] == [0, 2, 4, 7, 9]
    assert Analyzer(ledger, resumed.model).lineage[0].name == "one"


@support("Training loops", "Hugging Face Trainer, checkpoint and resume")
def test_the_second_moments_go_on_where_they_were(tmp_path, trainer_for):
    """Rows after the break are scaled by moments that the checkpoint restored, never raw again."""
    ledger = tmp_path / "ledger"
    broken = trainer_for("broken", [AttributionCallback(ledger, stage="one"), BreaksOff(5)])
    with pytest.raises(KeyboardInterrupt):
        broken.train()
    trainer_for("broken", [AttributionCallback(ledger, stage="one")]).train(resume_from_checkpoint=True)
    stage = Ledger(ledger).stage("one")
    assert dict(zip(stage.steps()["step"].to_pylist(), stage.steps()["version"].to_pylist(), strict=True)) == {
        1: 0, 2: 0, 3: 0, 4: 0, 5: 2, 6: 2, 7: 2, 8: 2, 9: 2,
    }  # fmt: skip
    assert [v["after_step"] for v in stage.meta["versions"]] == [4, 4]


def test_starting_over_under_the_same_name_is_refused_before_the_first_step(tmp_path, trainer_for):
    ledger = tmp_path / "ledger"
    with pytest.raises(KeyboardInterrupt):
        trainer_for("broken", [AttributionCallback(ledger, stage="one"), BreaksOff(3)]).train()
    again = trainer_for("again", [AttributionCallback(ledger, stage="one")])
    with pytest.raises(FileExistsError, match="resume it from a checkpoint"):
        again.train()
    assert Ledger(ledger).stage("one").count("steps") == 3


def test_a_checkpoint_of_another_recording_is_refused_before_the_first_step(tmp_path, trainer_for):
    """Both are called "one" and broke off; the file beside the checkpoint tells them apart."""
    for name in ("mine", "other"):
        callback = AttributionCallback(tmp_path / f"{name}-ledger", stage="one", sketch=RAW)
        with pytest.raises(KeyboardInterrupt):
            trainer_for(name, [callback, BreaksOff(3)]).train()
    again = trainer_for("mine", [AttributionCallback(tmp_path / "mine-ledger", stage="one", sketch=RAW)])
    with pytest.raises(ConfigurationError, match="none of recording 'one'"):
        again.train(resume_from_checkpoint=str(tmp_path / "other" / "checkpoint-2"))
    assert Ledger(tmp_path / "mine-ledger").stage("one").count("steps") == 3


def test_a_checkpoint_taken_without_recording_is_refused_where_the_name_is_taken(tmp_path, trainer_for):
    with pytest.raises(KeyboardInterrupt):
        trainer_for("plain", [BreaksOff(3)]).train()
    with pytest.raises(KeyboardInterrupt):
        trainer_for("mine", [AttributionCallback(tmp_path / "ledger", stage="one", sketch=RAW), BreaksOff(3)]).train()
    again = trainer_for("plain", [AttributionCallback(tmp_path / "ledger", stage="one", sketch=RAW)])
    with pytest.raises(ConfigurationError, match="it was taken without recording"):
        again.train(resume_from_checkpoint=True)


@support("Training loops", "Hugging Face Trainer, checkpoint and resume")
def test_two_callbacks_share_the_file_beside_a_checkpoint(tmp_path, trainer_for):
    """Each goes on with its own ledger. (The column's ids reach only one of them, the other names by content.)"""

    def both() -> list[Any]:
        return [AttributionCallback(tmp_path / name, stage="one", sketch=RAW, strict=True) for name in ("a", "b")]

    with pytest.raises(KeyboardInterrupt):
        trainer_for("broken", [*both(), BreaksOff(5)]).train()
    noted = json.loads((tmp_path / "broken" / "checkpoint-4" / sidecar.NAME).read_text())["stages"]
    assert [(entry["stage"], entry["step"]) for entry in noted] == [("one", 4)] * 2
    assert len({entry["began"] for entry in noted}) == 2
    trainer_for("broken", both()).train(resume_from_checkpoint=True)
    first, second = (
        {(step, row): found for (step, row, _), found in rows_of(tmp_path / name).items()} for name in ("a", "b")
    )
    assert first == second
    assert len(first) == 36
    for name in ("a", "b"):
        stage = Ledger(tmp_path / name).stage("one")
        assert (stage.meta["status"], stage.count("steps")) == ("complete", 9)
