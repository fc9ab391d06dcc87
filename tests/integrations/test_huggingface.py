"""The Trainer callback: bit-identical training, nothing left behind, one stage per run, whatever happens."""

from __future__ import annotations

import logging
import os
import random
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from tests.support import support
from trainer_attrib.errors import ConfigurationError, LedgerNotWritableError, ModelMismatchError, StageExistsError
from trainer_attrib.integrations.huggingface import AttributionCallback
from trainer_attrib.ledger.reader import Ledger
from trainer_attrib.ledger.storage import Storage
from trainer_attrib.testing.zoo import LinearOnThreeAxes
from trainer_attrib.types import SketchConfig

CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "accumulation": {"gradient_accumulation_steps": 3, "max_grad_norm": 0.1},
    "workers": {"dataloader_num_workers": 2},
    "sgd": {"optim": "sgd", "optim_args": "momentum=0.9", "learning_rate": 0.05},
    "checkpointing": {"gradient_checkpointing": True},
}
PROVES = {
    "accumulation": support("Training loops", "Hugging Face Trainer, gradient accumulation and clipping"),
    "workers": support("Data", "loader workers"),
    "checkpointing": support("Precision and compilation", "gradient checkpointing, of TrainingArguments"),
}


class Setup:
    """Makes trainers that differ in what a test says and in nothing else."""

    def __init__(self, gpt2: Callable, rows: Callable, collator: Any, tmp_path: Path) -> None:
        self._gpt2, self._rows, self._collator, self._tmp_path = gpt2, rows, collator, tmp_path

    def trainer(self, callbacks: list[Any], model: Any = None, **settings: Any) -> Trainer:
        rows = [{"id": f"row-{i}", **row} for i, row in enumerate(self._rows(12))]
        random.seed(3)
        np.random.seed(3)
        model = self._gpt2(dropout=0.1) if model is None else model
        torch.manual_seed(3)
        defaults = {
            "per_device_train_batch_size": 4, "num_train_epochs": 2, "learning_rate": 3e-3, "logging_steps": 1,
            "save_strategy": "no", "report_to": [], "disable_tqdm": True, "use_cpu": True, "seed": 5,
            "output_dir": str(self._tmp_path / "output"),
        }  # fmt: skip
        arguments = TrainingArguments(**{**defaults, **settings})
        data = datasets.Dataset.from_list(rows)
        return Trainer(model, arguments, train_dataset=data, data_collator=self._collator, callbacks=callbacks)


@pytest.fixture
def setup(tiny_gpt2: Callable, token_rows: Callable, pad_collator: Callable, tmp_path: Path) -> Setup:
    return Setup(tiny_gpt2, token_rows, pad_collator(), tmp_path)


def _outcome(trainer: Trainer) -> dict[str, Any]:
    """Everything that recording must not change."""
    trainer.train()
    logs = [{k: v for k, v in row.items() if k in ("loss", "grad_norm", "learning_rate", "step")} for row in
            trainer.state.log_history]  # fmt: skip
    return {
        "logs": logs,
        "weights": {name: p.detach().clone() for name, p in trainer.model.named_parameters()},
        "torch": torch.get_rng_state(),
        "numpy": np.random.get_state()[1].tolist(),
        "python": random.getstate(),
    }


def _assert_same(plain: dict[str, Any], recorded: dict[str, Any]) -> None:
    assert len(plain["logs"]) > 1
    assert plain["logs"] == recorded["logs"]
    assert all(torch.equal(p, recorded["weights"][name]) for name, p in plain["weights"].items())
    assert torch.equal(plain["torch"], recorded["torch"])
    assert plain["numpy"] == recorded["numpy"]
    assert plain["python"] == recorded["python"]


def _assert_nothing_left(trainer: Trainer, loader: Any = None) -> None:
    hooks = []
    for module in trainer.model.modules():
        hooks += [
            *module._forward_hooks.values(),
            *module._forward_pre_hooks.values(),
            *module._backward_hooks.values(),
        ]
    optimizer = trainer.optimizer
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    hooks += [*optimizer._optimizer_step_post_hooks.values(), *optimizer._optimizer_step_pre_hooks.values()]
    own = [hook for hook in hooks if getattr(hook, "__name__", "") != "make_inputs_require_grads"]  # transformers' own
    assert own == []
    assert "training_step" not in trainer.__dict__
    loader = trainer.callback_handler.train_dataloader if loader is None else loader
    assert type(loader.dataset).__module__.startswith("datasets")
    assert type(loader.collate_fn).__name__ == "PadCollator"


@support("Training loops", "Hugging Face Trainer")
@pytest.mark.parametrize("name", [pytest.param(name, marks=PROVES.get(name, ())) for name in CONFIGURATIONS])
def test_training_is_bit_identical(name: str, setup: Setup, tmp_path: Path) -> None:
    """Losses, gradient norms, weights and all random states, with dropout."""
    plain = _outcome(setup.trainer([], **CONFIGURATIONS[name]))
    trainer = setup.trainer(
        [AttributionCallback(tmp_path / "ledger", stage="one", strict=True)], **CONFIGURATIONS[name]
    )
    _assert_same(plain, _outcome(trainer))
    _assert_nothing_left(trainer)
    stage = Ledger(tmp_path / "ledger").stage("one")
    assert stage.meta["status"] == "complete"
    assert stage.count("rows") == 24
    assert stage.steps().num_rows == trainer.state.global_step


def test_training_is_bit_identical_when_only_some_steps_are_captured(setup: Setup, tmp_path: Path) -> None:
    plain = _outcome(setup.trainer([]))
    sketch = SketchConfig(every_n_steps=2)
    callback = AttributionCallback(tmp_path / "ledger", stage="one", sketch=sketch, strict=True)
    _assert_same(plain, _outcome(setup.trainer([callback])))
    assert Ledger(tmp_path / "ledger").stage("one").count("rows") == 12


class Stops(TrainerCallback):
    """Another callback, which breaks off training."""

    def __init__(self, error: type[BaseException]) -> None:
        self.error = error

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 2:
            raise self.error("stopped")


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt], ids=lambda error: error.__name__)
@pytest.mark.parametrize("where", ["callback", "model", "data"])
def test_a_run_that_breaks_off_leaves_nothing_behind(
    where: str, error: type[BaseException], setup: Setup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    callbacks: list[Any] = [AttributionCallback(tmp_path / "ledger", stage="one")]
    trainer = setup.trainer([*callbacks, Stops(error)] if where == "callback" else callbacks)
    calls = iter(range(100))

    def breaks(original: Callable[..., Any], after: int) -> Callable[..., Any]:
        def called(*args: Any, **kwargs: Any) -> Any:
            if next(calls) == after:
                raise error("stopped")
            return original(*args, **kwargs)

        return called

    if where == "model":  # in the middle of the third forward pass
        attention = trainer.model.transformer.h[1].attn
        monkeypatch.setattr(attention, "forward", breaks(attention.forward, 2))
    if where == "data":
        monkeypatch.setattr(trainer, "data_collator", Breaking(trainer.data_collator, error))
    with pytest.raises(error, match="stopped"):
        trainer.train()
    loader = trainer.callback_handler.train_dataloader
    if where == "data":
        assert isinstance(loader.collate_fn, Breaking)
        loader.collate_fn = loader.collate_fn.collate
    _assert_nothing_left(trainer, loader)
    stage = Ledger(tmp_path / "ledger").stage("one")
    assert (stage.meta["status"], stage.meta["reason"]) == ("incomplete", f"{error.__name__}: stopped")
    steps = 3 if where == "data" else 2
    assert stage.steps().num_rows == steps
    assert stage.problems() == []
    assert sum(block.table.num_rows for block in stage.rows()) == 4 * steps


class Breaking:
    """A collator that breaks at its fourth batch, the first of the second epoch."""

    def __init__(self, collate: Callable[..., Any], error: type[BaseException]) -> None:
        self.collate, self.error, self.left = collate, error, 3

    def __call__(self, items: Any) -> Any:
        if self.left == 0:
            raise self.error("stopped")
        self.left -= 1
        return self.collate(items)


def _injected(*args: Any, **kwargs: Any) -> Any:
    raise RuntimeError("injected")


FAULTS = {
    "hooks": "trainer_attrib.tap.record.sketch_examples",
    "rows": "trainer_attrib.capture.window.unit_rows",
    "ids": "trainer_attrib_integrations.huggingface._columns",
    "projections": "trainer_attrib.capture.step_recorder.StepRecorder._project",
}


@pytest.mark.parametrize("name", [*FAULTS, "disk"])
def test_capture_faults_never_end_training(
    name: str, setup: Setup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    plain = _outcome(setup.trainer([]))
    trainer = setup.trainer([AttributionCallback(tmp_path / "ledger", stage="one"), _breaking_disk(monkeypatch, name)])
    if name != "disk":
        monkeypatch.setattr(FAULTS[name], _injected)
    caplog.clear()
    _assert_same(plain, _outcome(trainer))
    warnings = [r for r in caplog.records if r.name == "trainer_attrib" and r.levelno >= logging.WARNING]
    assert len(warnings) == 1
    monkeypatch.undo()
    _assert_nothing_left(trainer)
    stage = Ledger(tmp_path / "ledger").stage("one")
    assert stage.meta["status"] in (["incomplete", "recording"] if name == "disk" else ["incomplete"])
    assert stage.problems() == []


def _breaking_disk(monkeypatch: pytest.MonkeyPatch, name: str) -> TrainerCallback:
    """From the third step on, nothing at all can be written."""

    class BreaksDisk(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 3 and name == "disk":
                monkeypatch.setattr(Storage, "write", _full)

    def _full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    return BreaksDisk()


def test_strict_raises_capture_faults(setup: Setup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = setup.trainer([AttributionCallback(tmp_path / "ledger", stage="one", strict=True)])
    monkeypatch.setattr(FAULTS["hooks"], _injected)
    with pytest.raises(RuntimeError, match="injected"):
        trainer.train()
    _assert_nothing_left(trainer)


def test_a_step_that_someone_else_replaced_is_put_back(setup: Setup, tmp_path: Path) -> None:
    """Another tool may have wrapped ``training_step`` before; leaving must not undo that."""
    trainer = setup.trainer([AttributionCallback(tmp_path / "ledger", stage="one")])
    original, calls = trainer.training_step, []

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return original(*args, **kwargs)

    trainer.training_step = counted
    trainer.train()
    assert len(calls) == trainer.state.global_step
    assert trainer.training_step is counted


def test_training_again_is_a_stage_of_its_own(setup: Setup, tmp_path: Path) -> None:
    trainer = setup.trainer([AttributionCallback(tmp_path / "ledger", stage="one")], max_steps=2)
    trainer.train()
    trainer.train()
    assert {s.name: s.parent for s in Ledger(tmp_path / "ledger").stages()} == {"one": None, "one.2": "one"}
    _assert_nothing_left(trainer)


def test_a_callback_added_later_records_too(setup: Setup, tmp_path: Path) -> None:
    trainer = setup.trainer([], max_steps=2)
    trainer.add_callback(AttributionCallback(tmp_path / "ledger", stage="one"))
    trainer.train()
    assert Ledger(tmp_path / "ledger").stage("one").count("rows") == 8
    _assert_nothing_left(trainer)


def test_a_callback_added_later_says_how_to_close_it(setup: Setup, tmp_path: Path, caplog: Any) -> None:
    """No event tells a callback that training broke off; given to the constructor, it closes itself."""
    trainer = setup.trainer([])
    callback = AttributionCallback(tmp_path / "ledger", stage="one")
    trainer.add_callback(callback)
    trainer.add_callback(Stops(RuntimeError))
    with pytest.raises(RuntimeError, match="stopped"):
        trainer.train()
    assert "call its close()" in caplog.text
    callback.close()
    _assert_nothing_left(trainer)
    assert Ledger(tmp_path / "ledger").stage("one").meta["status"] == "incomplete"


def test_bad_input_is_refused_before_training(
    setup: Setup, tmp_path: Path, tiny_gpt2: Callable, train: Callable, files_of: Callable
) -> None:
    (tmp_path / "file").write_text("precious")
    with pytest.raises(LedgerNotWritableError):
        AttributionCallback(tmp_path / "file", stage="one")
    train(LinearOnThreeAxes(), tmp_path / "ledger", "one")
    before = files_of(tmp_path / "ledger")
    with pytest.raises(StageExistsError):
        AttributionCallback(tmp_path / "ledger", stage="one")
    trainer = setup.trainer([AttributionCallback(tmp_path / "ledger", stage="two")])
    weights = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    with pytest.raises(ModelMismatchError):
        trainer.train()
    assert trainer.state.global_step == 0
    assert all(torch.equal(p, weights[name]) for name, p in trainer.model.named_parameters())
    assert files_of(tmp_path / "ledger") == before
    _assert_nothing_left(trainer)


def test_without_transformers_the_error_says_what_to_install() -> None:
    code = "import sys; sys.modules['transformers'] = None; import trainer_attrib.integrations.huggingface"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=environment)
    assert found.returncode != 0
    assert "MissingExtraError: 'transformers' is not installed." in found.stderr
    assert "pip install 'trainer-attrib[huggingface]'" in found.stderr


@pytest.mark.parametrize(
    ("found", "message"),
    [
        pytest.param(
            {"n_gpu": 2}, "2 GPUs under nn.DataParallel",
            marks=support("Many processes", "nn.DataParallel, transformers.Trainer", refused=True),
        ),
        pytest.param(
            {"deepspeed": "zero.json"}, "runs under DeepSpeed",
            marks=support("Many processes", "DeepSpeed, transformers.Trainer", refused=True),
        ),
    ],
)  # fmt: skip
def test_replicas_are_refused_before_the_first_step(found: dict[str, Any], message: str, tmp_path: Path) -> None:
    """Neither can run here, so the arguments are made up."""
    callback = AttributionCallback(tmp_path / "ledger", stage="one")
    args = types.SimpleNamespace(**{"n_gpu": 1, "deepspeed": None, **found})
    with pytest.raises(ConfigurationError, match=message):
        callback.on_train_begin(args, None, None)
    assert not (tmp_path / "ledger" / "stages").exists()


def test_a_run_in_which_no_layer_fires_says_so(setup: Setup, tmp_path: Path, caplog: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr("trainer_attrib.tap.module_tap._differentiable", lambda output, site: False)
    setup.trainer([AttributionCallback(tmp_path / "ledger", stage="one")], max_steps=2).train()
    assert "no layer fired in the first step" in caplog.text
    assert Ledger(tmp_path / "ledger").stage("one").count("steps") == 2
