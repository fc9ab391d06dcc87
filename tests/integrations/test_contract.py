"""The contract suite, kept by every integration; and all of them record the same run alike."""

from __future__ import annotations

import itertools
import signal
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import nn

from tests.integrations.test_lightning_resume import Loader
from tests.support import support
from trainer_attrib.capture.recorder import Recorder
from trainer_attrib.ledger.reader import Ledger
from trainer_attrib.testing.contract import IntegrationContract
from trainer_attrib.testing.run import Run, Trained, collate
from trainer_attrib.types import SketchConfig

transformers = pytest.importorskip("transformers")
pl = pytest.importorskip("lightning.pytorch")
accelerate = pytest.importorskip("accelerate")

import datasets  # noqa: E402
from lightning.pytorch.callbacks import ModelCheckpoint  # noqa: E402
from lightning.pytorch.plugins import MixedPrecision  # noqa: E402

from trainer_attrib.integrations import huggingface, lightning  # noqa: E402


@support("Training loops", "Hugging Face Trainer")
class TestHuggingFace(IntegrationContract):
    unsupported: ClassVar = {}
    event_order: ClassVar = {
        "transformers 5.23": [
            "on_train_begin",
            *2 * ["on_step_begin", "forward pass", "on_substep_end", "forward pass", "on_pre_optimizer_step",
                  "optimizer's post-step hook", "on_optimizer_step", "on_step_end"],
            "on_train_end",
        ],
    }  # fmt: skip

    def trainer(self, run: Run, callbacks: list[Any], **settings: Any) -> Any:
        model = run.model()
        limits = {"max_steps": run.max_steps or -1} | ({"num_train_epochs": run.epochs} if run.epochs else {})
        arguments = transformers.TrainingArguments(
            str(run.folder / "out"), per_device_train_batch_size=run.batch_size, max_grad_norm=run.clip or 0.0,
            gradient_accumulation_steps=run.accumulate, dataloader_num_workers=run.workers, logging_steps=1,
            train_sampling_strategy="random" if run.shuffle else "sequential", report_to=[], disable_tqdm=True,
            use_cpu=True, save_strategy="steps" if run.save_every else "no", save_steps=run.save_every or 1,
            seed=run.seed, **limits, **settings,
        )  # fmt: skip
        trainer = transformers.Trainer(
            model, arguments, train_dataset=datasets.Dataset.from_list(list(run.examples)), data_collator=collate,
            callbacks=callbacks, optimizers=run.tuning(model.parameters()),
        )  # fmt: skip
        return scaled(trainer, scaler_of(run))

    def train(self, run: Run) -> Trained:
        options = {"stage": "one", "sketch": run.sketch, "strict": run.strict}
        callbacks = [] if run.ledger is None else [huggingface.AttributionCallback(run.ledger, **options)]
        trainer = self.trainer(run, callbacks)
        trainer.train(resume_from_checkpoint=run.resume)
        return Trained(trainer.model, [row["loss"] for row in trainer.state.log_history if "loss" in row])

    def events(self, run: Run) -> tuple[str, list[str]]:
        names = ("on_train_begin", "on_step_begin", "on_substep_end", "on_pre_optimizer_step", "on_optimizer_step",
                 "on_step_end", "on_train_end")  # fmt: skip
        seen: list[str] = []
        trainer = self.trainer(run, [noting(transformers.TrainerCallback, names, seen)])
        note_hooks(run.made[-1], trainer.optimizer, seen)
        trainer.train()
        return f"transformers {transformers.__version__}", seen


class Scaling(MixedPrecision):
    """A gradient scaler without half precision."""

    def forward_context(self) -> Any:
        return nullcontext()


@support("Training loops", "Lightning, automatic optimization")
@pytest.mark.filterwarnings("ignore:.*you used `ckpt_path`", "ignore:Checkpoint directory")
class TestLightning(IntegrationContract):
    unsupported: ClassVar = {}
    event_order: ClassVar = {
        "lightning 2.6": [
            "on_train_start",
            *2 * ["on_train_batch_start", "forward pass", "on_before_backward", "on_train_batch_end",
                  "on_train_batch_start", "forward pass", "on_before_backward", "on_before_optimizer_step",
                  "optimizer's post-step hook", "on_train_batch_end"],
            "on_train_end", "teardown",
        ],
    }  # fmt: skip

    @pytest.fixture(autouse=True)
    def _signals(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """After Ctrl+C Lightning ignores it for the rest of the process."""
        monkeypatch.setattr(signal, "signal", lambda *args: None)

    def trainer(self, run: Run, callbacks: list[Any]) -> Any:
        if run.save_every:
            callbacks = [*callbacks, ModelCheckpoint(run.folder, filename="{step}", every_n_train_steps=run.save_every)]
        scaler = scaler_of(run)
        return pl.Trainer(
            max_epochs=run.epochs or -1, max_steps=run.max_steps or -1, accumulate_grad_batches=run.accumulate,
            gradient_clip_val=run.clip, callbacks=callbacks, logger=False, enable_checkpointing=bool(run.save_every),
            enable_progress_bar=False, enable_model_summary=False, accelerator="cpu", default_root_dir=str(run.folder),
            plugins=[Scaling("16-mixed", "cpu", scaler)] if scaler else [],
        )  # fmt: skip

    def train(self, run: Run) -> Trained:
        options = {"stage": "one", "sketch": run.sketch, "strict": run.strict}
        callbacks = [] if run.ledger is None else [lightning.AttributionCallback(run.ledger, **options)]
        module, checkpoint = Lit(run), next(run.folder.glob("*.ckpt")) if run.resume else None
        self.trainer(run, callbacks).fit(module, resumable(run), ckpt_path=checkpoint, weights_only=False)
        return Trained(module, module.losses)

    def events(self, run: Run) -> tuple[str, list[str]]:
        names = ("on_train_start", "on_train_batch_start", "on_before_backward", "on_before_optimizer_step",
                 "on_train_batch_end", "on_train_end", "teardown")  # fmt: skip
        seen: list[str] = []
        module = Lit(run)
        optimizer, _ = run.tuning(module.parameters())
        note_hooks(module.net, optimizer, seen)
        module.configure_optimizers = lambda: optimizer
        self.trainer(run, [noting(pl.Callback, names, seen)]).fit(module, run.loader())
        return f"lightning {pl.__version__}", seen


def resumable(run: Run) -> Any:
    """The run's loader, which Lightning can resume in mid-epoch if checkpoints are saved."""
    options = {"batch_size": run.batch_size, "collate_fn": collate, "num_workers": run.workers}
    return Loader(list(run.examples), **options) if run.save_every else run.loader()


class Lit(pl.LightningModule):
    """The run's model as most people wrap theirs."""

    def __init__(self, run: Run) -> None:
        super().__init__()
        self.net, self.run_of, self.losses = run.model(), run, []

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = self.net(input_ids=batch["input_ids"], labels=batch["labels"])["loss"]
        self.losses.append(float(loss.detach()))
        return loss

    def configure_optimizers(self) -> Any:
        optimizer, schedule = self.run_of.tuning(self.parameters())
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Loop(IntegrationContract):
    """A training loop of one's own around the recorder, from whatever step it is at."""

    unsupported: ClassVar = {"event order": "no events are relied on"}

    def recorded(
        self, run: Run, model: nn.Module, optimizer: Any, done: int, loop: Callable[[Any], None], scaler: Any = None
    ) -> None:
        """What ``with Recorder(...)`` does, where a loop may begin after a checkpoint."""
        if run.ledger is None:
            return loop(None)
        recorder = Recorder(
            run.ledger, stage="one", model=model, optimizer=optimizer, sketch=run.sketch, strict=run.strict,
            scaler=scaler,
        )  # fmt: skip
        recorder.clip_threshold = run.clip
        recorder.start(after_step=done)
        try:
            loop(recorder)
        except BaseException as error:
            recorder.interrupt(f"{type(error).__name__}: {error}")
            raise
        return recorder.finish()


@support("Training loops", "plain loop")
class TestPlainLoop(Loop):
    @support("Training loops", "plain loop, checkpoint and resume")
    def test_a_resumed_run_has_every_row_once(self, tmp_path: Path) -> None:
        super().test_a_resumed_run_has_every_row_once(tmp_path)

    def train(self, run: Run) -> Trained:
        model, losses = run.model(), []
        optimizer, schedule = run.tuning(model.parameters())
        checkpoint, done = run.folder / "checkpoint.pt", 0
        parts = {"model": model, "optimizer": optimizer, "schedule": schedule}
        scaler = scaler_of(run) or torch.amp.GradScaler("cpu", enabled=False)
        if run.resume:
            state = torch.load(checkpoint)
            done = state.pop("step")
            for name, saved in state.items():
                parts[name].load_state_dict(saved)

        def loop(recorder: Recorder | None) -> None:
            for step, window in enumerate(windows_of(run), 1):
                if step <= done:
                    continue
                for batch in window:
                    with recorder.batch(batch["id"]) if recorder else nullcontext():
                        loss = model(input_ids=batch["input_ids"], labels=batch["labels"])["loss"] / run.accumulate
                        scaler.scale(loss).backward()
                    if recorder:
                        recorder.note_loss(loss)
                    losses.append(float(loss.detach()))
                scaler.unscale_(optimizer)
                if run.clip:
                    nn.utils.clip_grad_norm_(model.parameters(), run.clip)
                scaler.step(optimizer)
                scaler.update()
                schedule.step()
                optimizer.zero_grad()
                if run.save_every and step % run.save_every == 0:
                    torch.save({"step": step} | {name: part.state_dict() for name, part in parts.items()}, checkpoint)

        self.recorded(run, model, optimizer, done, loop, scaler)
        return Trained(model, losses)


@support("Training loops", "accelerate")
class TestAccelerate(Loop):
    @support("Training loops", "accelerate, checkpoint and resume")
    def test_a_resumed_run_has_every_row_once(self, tmp_path: Path) -> None:
        super().test_a_resumed_run_has_every_row_once(tmp_path)

    def train(self, run: Run) -> Trained:
        accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=run.accumulate)
        accelerator.scaler = scaler_of(run)  # as it makes one for fp16, but on a GPU only
        plain, losses = run.model(), []
        tuning = run.tuning(plain.parameters())
        model, optimizer, schedule, loader = accelerator.prepare(plain, *tuning, run.loader())
        checkpoint, done = run.folder / "checkpoint", 0
        if run.resume:
            accelerator.load_state(checkpoint)
            done = int(tuning[1].last_epoch)  # the schedule counts steps

        def loop(recorder: Recorder | None) -> None:
            step, seen, skipped = done, 0, done * run.accumulate
            while True:
                for batch in loader:
                    seen += 1
                    if seen <= skipped:
                        continue
                    with accelerator.accumulate(model):
                        with recorder.batch(batch["id"]) if recorder else nullcontext():
                            loss = model(input_ids=batch["input_ids"], labels=batch["labels"])["loss"]
                            accelerator.backward(loss)
                        if recorder:
                            recorder.note_loss(loss / run.accumulate)
                        losses.append(float(loss.detach()))
                        if run.clip and accelerator.sync_gradients:
                            accelerator.clip_grad_norm_(model.parameters(), run.clip)
                        optimizer.step()
                        schedule.step()
                        optimizer.zero_grad()
                    if not accelerator.sync_gradients:
                        continue
                    step += 1
                    if run.save_every and step % run.save_every == 0:
                        accelerator.save_state(checkpoint)
                    if step == run.max_steps:
                        return
                if run.epochs is not None and seen == run.epochs * len(loader):
                    return

        self.recorded(run, accelerator.unwrap_model(model), optimizer, done, loop)
        return Trained(plain, losses)


def scaler_of(run: Run) -> Any:
    """A CPU's gradient scaler, for a run that overflows one."""
    return torch.amp.GradScaler("cpu", init_scale=2.0**10) if run.overflow_at else None


def scaled(trainer: Any, scaler: Any) -> Any:
    """The Trainer with what accelerate would give it for fp16, if there were a GPU."""
    accelerator = trainer.accelerator
    if scaler is not None:
        accelerator.scaler = scaler
        accelerator.unscale_gradients = lambda: [scaler.unscale_(each.optimizer) for each in accelerator._optimizers]
    return trainer


def noting(base: type, names: tuple[str, ...], seen: list[str]) -> Any:
    """A callback that notes the order of these events."""

    def event(name: str) -> Callable[..., None]:
        return lambda self, *args, **kwargs: seen.append(name)

    return type("Noting", (base,), {name: event(name) for name in names})()


def note_hooks(model: nn.Module, optimizer: Any, seen: list[str]) -> None:
    """Note forward passes and executed updates among the events."""
    model.register_forward_pre_hook(lambda *args: seen.append("forward pass"))
    optimizer.register_step_post_hook(lambda *args: seen.append("optimizer's post-step hook"))


def windows_of(run: Run) -> Iterator[list[dict[str, Any]]]:
    """The micro-batches of each optimizer step, epoch after epoch."""
    loader, step = run.loader(), 0
    for _ in itertools.count() if run.epochs is None else range(run.epochs):
        batches = iter(loader)
        while window := list(itertools.islice(batches, run.accumulate)):
            yield window
            if (step := step + 1) == run.max_steps:
                return


INTEGRATIONS = (TestHuggingFace, TestLightning, TestPlainLoop, TestAccelerate)


def test_all_integrations_record_the_same_run_alike(tmp_path: Path) -> None:
    """Not only like the reference: same ids in the same places, same steps, rows equal to 1e-6."""
    found, whole = [], SketchConfig(rank=16, dtype="float32", correction="none")  # unprojected: projections go by name
    settings = {"accumulate": 3, "epochs": 3, "clip": 0.05, "schedule": lambda step: 1 / (1 + step), "sketch": whole}
    for kind in INTEGRATIONS:
        ledger = tmp_path / kind.__name__
        torch.manual_seed(0)
        kind().train(Run(tmp_path, ledger, **settings))
        stage = Ledger(ledger).stage("one")
        (block,) = stage.rows()
        found.append((block.table.to_pylist(), block.sketches, stage.steps().to_pylist()))
    rows, sketches, steps = found[0]
    assert (len(rows), len(steps)) == (30, 3)
    numbers = ("loss", "gradient_norm", "learning_rate", "clip_threshold", "audit_scale")
    same = ("step", "micro_batches", "rows", "captured", "weight_decay", "beta1", "beta2", "version")
    for other_rows, other_sketches, other_steps in found[1:]:
        np.testing.assert_allclose(sketches, other_sketches, rtol=0, atol=1e-6)
        for row, other in zip(rows, other_rows, strict=True):
            assert other["norm"] == pytest.approx(row["norm"], rel=1e-6)
            assert other["denominator"] == pytest.approx(row["denominator"], rel=1e-6)
            assert {**row, "norm": 0, "denominator": 0, "epoch": 0} == {
                **other, "norm": 0, "denominator": 0, "epoch": 0,
            }  # fmt: skip
        for step, other in zip(steps, other_steps, strict=True):
            assert {key: step[key] for key in same} == {key: other[key] for key in same}
            for key in numbers:
                assert other[key] == pytest.approx(step[key], rel=1e-5 if key == "audit_scale" else 1e-6)
