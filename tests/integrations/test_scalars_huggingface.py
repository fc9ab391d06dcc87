"""Scalars of the recording in what the trainer reports: there for every reporter, and nowhere else."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from trainer_attrib.integrations.huggingface import AttributionCallback
from trainer_attrib.ledger.reader import Ledger
from trainer_attrib.types import SketchConfig

NAMES = {f"trainer_attrib/{name}" for name in ("rows", "bytes", "overhead", "loss_of_covered", "coverage")}
RUN_TIMES = ("train_runtime", "train_samples_per_second", "train_steps_per_second", "eval_runtime",
             "eval_samples_per_second", "eval_steps_per_second")  # fmt: skip


class Reporter(TrainerCallback):
    """What TensorBoard's and W&B's callbacks do: takes whatever is logged."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, dict[str, Any]]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.seen.append((state.global_step, dict(logs)))

    def ours(self) -> list[tuple[int, dict[str, float]]]:
        return [(step, found) for step, logs in self.seen if (found := own(logs))]


class Caught(TrainerCallback):
    """Lets the writer's thread catch up before anything is logged, so that numbers can be compared."""

    def __init__(self, attribution: AttributionCallback) -> None:
        self.attribution = attribution

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.attribution._recorder._writer.flush()


def own(logs: dict[str, Any]) -> dict[str, float]:
    return {name: value for name, value in logs.items() if name.startswith("trainer_attrib/")}


@pytest.fixture
def make(tiny_gpt2: Callable, token_rows: Callable, pad_collator: Callable, tmp_path: Path) -> Callable[..., Trainer]:
    def made(callbacks: list[Any], **settings: Any) -> Trainer:
        random.seed(3)
        np.random.seed(3)
        model = tiny_gpt2(dropout=0.1)
        torch.manual_seed(3)
        defaults = {
            "per_device_train_batch_size": 4, "num_train_epochs": 2, "logging_steps": 2, "save_strategy": "no",
            "report_to": [], "disable_tqdm": True, "use_cpu": True, "seed": 5, "output_dir": str(tmp_path / "output"),
        }  # fmt: skip
        data = datasets.Dataset.from_list(token_rows(12))
        arguments = TrainingArguments(**{**defaults, **settings})
        return Trainer(
            model, arguments, train_dataset=data, eval_dataset=data, data_collator=pad_collator(), callbacks=callbacks
        )

    return made


def attribution(tmp_path: Path, name: str = "ledger", **options: Any) -> AttributionCallback:
    return AttributionCallback(tmp_path / name, stage="one", **{"strict": True, **options})


def timeless(logs: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in logs.items() if name not in RUN_TIMES}


@pytest.mark.parametrize("first", [True, False], ids=["reporter-first", "reporter-last"])
def test_every_reporter_sees_them_whatever_the_order(first: bool, make: Callable, tmp_path: Path) -> None:
    callback, reporter = attribution(tmp_path), Reporter()
    caught = Caught(callback)
    trainer = make([reporter, callback, caught] if first else [callback, caught, reporter])
    trainer.train()
    seen = reporter.ours()
    assert [step for step, _ in seen] == [2, 4, 6, 6]  # every second step, and the end's summary
    assert set(seen[0][1]) == NAMES
    assert [found["trainer_attrib/rows"] for _, found in seen] == [8, 16, 24, 24]
    sizes = [found["trainer_attrib/bytes"] for _, found in seen]
    assert 0 < sizes[0] < sizes[1] < sizes[2]
    stage = Ledger(tmp_path / "ledger").stage("one")
    assert {found["trainer_attrib/coverage"] for _, found in seen} == {stage.meta["coverage"]["share"]}
    assert all(found["trainer_attrib/overhead"] > 0 for _, found in seen)
    assert "trainer_attrib/loss_of_covered" not in seen[-1][1]  # no step since the last entry


def test_the_loss_of_covered_examples_is_that_of_the_steps_with_rows(make: Callable, tmp_path: Path) -> None:
    callback, reporter = attribution(tmp_path, sketch=SketchConfig(every_n_steps=3)), Reporter()
    trainer = make([callback, Caught(callback), reporter], logging_steps=1)
    trainer.train()
    found = {step: logs.get("trainer_attrib/loss_of_covered") for step, logs in reporter.seen if "loss" in logs}
    losses = {row["step"]: row["loss"] for row in trainer.state.log_history if "loss" in row}
    assert [step for step, loss in found.items() if loss is not None] == [1, 4]
    assert [found[1], found[4]] == pytest.approx([losses[1], losses[4]], rel=1e-5)


def test_history_metrics_and_console_are_what_they_were(make: Callable, tmp_path: Path, capsys: Any) -> None:
    settings = {"eval_strategy": "epoch", "save_strategy": "epoch", "max_grad_norm": 0.3}
    outcomes = []
    for callbacks in ([], [attribution(tmp_path)]):
        reporter = Reporter()
        trainer = make([*callbacks, reporter], **settings)
        metrics = trainer.train().metrics
        printed = capsys.readouterr().out
        assert "trainer_attrib/" not in printed
        assert "loss" in printed
        saved = (tmp_path / "output" / "checkpoint-6" / "trainer_state.json").read_text()
        assert "trainer_attrib/" not in saved
        outcomes.append(
            {
                "history": [timeless(row) for row in trainer.state.log_history],
                "metrics": timeless(metrics),
                "reported": [(step, timeless(logs).keys() - NAMES) for step, logs in reporter.seen],
                "weights": {name: p.detach().clone() for name, p in trainer.model.named_parameters()},
                "random": (torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()),
            }
        )
        evaluated = [own(logs) for _, logs in reporter.seen if "eval_loss" in logs]
        assert evaluated == [{}, {}]
    plain, recorded = outcomes
    assert len(plain["history"]) > 4
    for part in ("history", "metrics", "reported"):
        assert plain[part] == recorded[part], part
    assert all(torch.equal(p, recorded["weights"][name]) for name, p in plain["weights"].items())
    assert torch.equal(plain["random"][0], recorded["random"][0])
    assert plain["random"][1:] == recorded["random"][1:]


class Takes(TrainerCallback):
    """Takes entries out of the logs and adds some, as the trainer's own printer does."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        logs.pop("learning_rate", None)
        logs["added"] = 1.0


def test_what_a_callback_does_to_the_logs_reaches_those_after_it(make: Callable, tmp_path: Path) -> None:
    callback, reporter = attribution(tmp_path), Reporter()
    make([callback, Takes(), reporter]).train()
    for _, logs in reporter.seen:
        assert "learning_rate" not in logs
        assert logs["added"] == 1.0
        assert NAMES - {"trainer_attrib/loss_of_covered"} <= logs.keys()


def test_nothing_is_left_on_the_callbacks(make: Callable, tmp_path: Path) -> None:
    """Also where two recordings watch one trainer: the first to end lies below the other."""
    reporter = Reporter()
    trainer = make([attribution(tmp_path, "a"), attribution(tmp_path, "b"), reporter])
    before = [copy.copy(vars(callback)) for callback in trainer.callback_handler.callbacks]
    trainer.train()
    after = [vars(callback) for callback in trainer.callback_handler.callbacks]
    assert all("on_log" not in own for own in [*before, *after])
    assert "training_step" not in vars(trainer)
    assert "clip_grad_norm_" not in vars(trainer.accelerator)
    assert len(reporter.ours()) == 4
    count = len(reporter.seen)
    trainer.log({"loss": 1.0})
    assert len(reporter.seen) == count + 1
    assert own(reporter.seen[-1][1]) == {}


def test_a_fault_of_the_scalars_ends_neither_training_nor_recording(
    make: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    def injected(*args: Any) -> None:
        raise RuntimeError("injected")

    monkeypatch.setattr("trainer_attrib.capture.recorder.scalars_of", injected)
    reporter = Reporter()
    make([attribution(tmp_path), reporter]).train()
    assert caplog.text.count("nothing more about the recording goes to the tracker: RuntimeError: injected") == 1
    assert reporter.ours() == []
    assert len(reporter.seen) == 4
    stage = Ledger(tmp_path / "ledger").stage("one")
    assert (stage.meta["status"], stage.count("rows")) == ("complete", 24)


def test_once_capture_has_stopped_there_are_none(
    make: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def injected(*args: Any) -> None:
        raise RuntimeError("injected")

    monkeypatch.setattr("trainer_attrib.tap.record.sketch_examples", injected)
    reporter = Reporter()
    make([attribution(tmp_path, strict=False), reporter]).train()
    assert [step for step, _ in reporter.seen] == [2, 4, 6, 6]
    assert reporter.ours() == []
