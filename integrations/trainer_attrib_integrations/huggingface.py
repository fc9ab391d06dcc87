"""The callback for ``transformers.Trainer`` and every TRL trainer: begins, names and ends a recording, nothing else."""

from __future__ import annotations

import copy
import functools
import inspect
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from trainer_attrib.capture.messages import logger
from trainer_attrib.capture.processes import Processes
from trainer_attrib.capture.recorder import Recorder
from trainer_attrib.capture.shadows.refusals import Asked, asked_shadows
from trainer_attrib.errors import ConfigurationError, MissingExtraError
from trainer_attrib.ledger.journal import check_place
from trainer_attrib.ledger.resuming import place_to_begin
from trainer_attrib.types import LossForm, SketchConfig

try:
    from transformers import Trainer, TrainerCallback
    from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
except ImportError as error:
    raise MissingExtraError("transformers", "huggingface") from error

from trainer_attrib_integrations import shadows_huggingface, sidecar
from trainer_attrib_integrations.loss_forms import loss_form
from trainer_attrib_integrations.riding_ids import RidingIds
from trainer_attrib_integrations.scalars_huggingface import show_scalars
from trainer_attrib_integrations.wrapped import Wrapped

_TEXT_LIMIT = 2000


class AttributionCallback(TrainerCallback):
    """Record a training stage: ``Trainer(..., callbacks=[AttributionCallback("runs/chat", stage="sft")])``.

    Examples are named by ``id_column`` of the trainer's ``train_dataset`` if it has one (it need not survive
    ``remove_unused_columns`` or the collator), else by a hash of their content.

    Args:
        ledger: directory or fsspec URL, the same for all stages of a model.
        stage: name of this stage, new in the ledger. A second ``train()`` on the same trainer becomes ``stage.2``. With
            ``train(resume_from_checkpoint=...)`` a stage of this name that broke off is gone on with.
        sketch: how gradients are compressed.
        snapshots: how many snapshots inside the stage, beside its start and end.
        strict: raise capture faults; otherwise they are reported once and training goes on.
        shadow: earlier stages without which weights are trained along, by name or as :class:`types.Shadow`
            (docs/recording.md).
        id_column: column with a unique name per example.
        source_column: column that says where an example comes from.

    Raises:
        ConfigurationError, StageExistsError, LedgerNotWritableError, LedgerFormatError: at once, not in mid-training.
    """

    def __init__(
        self,
        ledger: str | os.PathLike[str],
        *,
        stage: str,
        sketch: SketchConfig | None = None,
        snapshots: int = 3,
        strict: bool = False,
        shadow: Asked = (),
        id_column: str = "id",
        source_column: str = "source",
    ) -> None:
        check_place(ledger, stage)
        self._ledger, self._stage, self._attempts = ledger, stage, 0
        self._options: dict[str, Any] = {
            "sketch": sketch, "snapshots": snapshots, "strict": strict, "shadow": asked_shadows(shadow),
        }  # fmt: skip
        self._columns = (id_column, source_column)
        self._closes_itself = self._in_train = self._reached_end = False
        self._checkpoint: Path | None = None  # that training resumes from, if it was named
        self._recorder: Recorder | None = None
        self._ids: RidingIds | None = None
        self._trainer: Trainer | None = None
        self._loss = LossForm()
        self._wrapped = Wrapped()

    def close(self) -> None:
        """Close a stage that broke off. Only needed if the callback came by ``trainer.add_callback``: given to the
        trainer's constructor, it closes itself whatever happens."""
        self._stop("closed by the user")

    # ---- events -------------------------------------------------------------------------------------------------

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Make sure that a run that breaks off closes the stage: no event says so."""
        trainer = _calling_trainer(self)
        if trainer is not None:
            trainer.train = self._closing_afterwards(trainer.train)
            self._closes_itself = True

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Open the stage."""
        _refuse_replicas(args)
        self._stop("training was started again")
        self._reached_end = False
        self._trainer = _calling_trainer(self)
        self._loss = LossForm() if self._trainer is None else loss_form(self._trainer)
        name = self._stage if self._attempts == 0 else f"{self._stage}.{self._attempts + 1}"
        stage, after_step = Processes.current().led(lambda: self._place(name, args, state))
        self._attempts += after_step == 0
        tokenizer = kwargs.get("processing_class")
        recorder = Recorder(
            self._ledger,
            stage=stage,
            model=kwargs["model"],
            optimizer=kwargs["optimizer"],
            total_steps=state.max_steps - state.global_step + after_step,
            describe=_decoder(tokenizer) if hasattr(tokenizer, "batch_decode") else None,
            loss=self._loss,
            facts=_facts(args, self._trainer),
            **self._options,
        )
        if recorder.shadows:
            shadows_huggingface.surround(recorder, self._trainer, self._loss)
        self._recorder = recorder.start(after_step=after_step)
        leads = Processes.current().leads
        if leads and state.global_step and not after_step:
            logger.info(
                "stage '%s' begins after step %d of the training; what came before is not in it",
                stage,
                state.global_step,
            )
        if leads and not self._closes_itself:
            logger.warning(
                "the callback was added after the trainer was made; if training breaks off between two training steps, "
                "call its close(), or pass it to the trainer's constructor next time"
            )
        self._recorder.clip_threshold = args.max_grad_norm or None
        self._recorder.attempt(lambda: self._arrange(kwargs.get("train_dataloader")))

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Tell the recorder the epoch that the next rows belong to."""
        if self._recorder is not None:
            self._recorder.epoch = state.epoch

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note in the checkpoint which stage it belongs to."""
        recorder = self._recorder
        if recorder is not None:
            recorder.attempt(lambda: _note(_checkpoint_of(args, state), recorder.checkpoint(), args.should_save))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave the trainer as it was, and close the stage: inside our ``train`` when that returns, since other
        callbacks may put averaged weights into the model in this event."""
        self._leave()
        self._reached_end = True
        if not self._in_train:
            self._finish()

    def _place(self, name: str, args: Any, state: Any) -> tuple[str, int]:
        folder = self._checkpoint or _checkpoint_of(args, state)
        noted = sidecar.noted_for(folder, self._ledger) if state.global_step else {}
        return place_to_begin(self._ledger, name, noted, state.global_step)

    # ---- what the events do ---------------------------------------------------------------------------------------

    def _arrange(self, loader: Any) -> None:
        """Let ids ride along, and name each micro-batch around the trainer's own training step."""
        if self._trainer is None:
            logger.warning("the trainer was not found; examples are named by content and losses are not recorded")
            return
        named = _columns(self._trainer.train_dataset, *self._columns)
        if named is not None and loader is not None:
            ids = RidingIds(loader, *named)
            if ids.install():
                self._ids = ids
            elif Processes.current().leads:
                logger.warning("column '%s' does not fit the loader's rows; ids are content hashes", self._columns[0])
        training_step: Callable[..., Any] = self._trainer.training_step
        if self._recorder is not None and self._recorder.shadows:
            training_step = shadows_huggingface.offering(self._recorder, self._trainer, self._loss, training_step)
        self._wrapped.put(self._trainer, "training_step", self._naming(training_step))
        if self._recorder is not None:
            show_scalars(self._recorder, self._trainer, self._wrapped)
        accelerator = self._trainer.accelerator
        self._wrapped.put(accelerator, "clip_grad_norm_", self._telling(accelerator.clip_grad_norm_))

    def _naming(self, training_step: Callable[..., Any]) -> Callable[..., Any]:
        recorder, per_token = self._recorder, self._loss.per_token
        assert recorder is not None

        @functools.wraps(training_step)
        def named_step(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            ids, sources = RidingIds.take(inputs)
            count = (args[0] if args else kwargs.get("num_items_in_batch")) if per_token else None
            try:
                with recorder.batch(ids, sources=sources, denominator=count, if_they_fit=True):
                    loss = training_step(model, inputs, *args, **kwargs)
            except BaseException as error:
                self._stop(f"{type(error).__name__}: {error}")
                raise
            recorder.note_loss(loss)
            return loss

        return named_step

    def _telling(self, clip: Callable[..., Any]) -> Callable[..., Any]:
        recorder = self._recorder
        assert recorder is not None

        @functools.wraps(clip)
        def telling_clip(parameters: Any, max_norm: float, norm_type: float = 2) -> Any:
            norm = clip(parameters, max_norm, norm_type)
            if norm_type == 2:
                recorder.note_gradient_norm(norm, max_norm)
            return norm

        return telling_clip

    def _closing_afterwards(self, train: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(train)
        def closed_train(*args: Any, **kwargs: Any) -> Any:
            given = args[0] if args else kwargs.get("resume_from_checkpoint")
            self._checkpoint = Path(given) if isinstance(given, str | os.PathLike) else None
            self._in_train = True
            try:
                found = train(*args, **kwargs)
                if self._reached_end:
                    self._finish()
                return found
            except BaseException as error:
                self._stop(f"{type(error).__name__}: {error}")
                raise
            finally:
                self._in_train = False
                self._stop("training ended without telling its callbacks")

        return closed_train

    def _finish(self) -> None:
        if self._recorder is not None:
            self._recorder.finish()

    def _stop(self, reason: str) -> None:
        self._leave()
        if self._recorder is not None:
            self._recorder.interrupt(reason)

    def _leave(self) -> None:
        """Leave the trainer and its loader as they were."""
        self._wrapped.remove()
        if self._ids is not None:
            self._ids.remove()
        self._trainer = self._ids = None


def _calling_trainer(callback: TrainerCallback) -> Trainer | None:
    """The trainer whose event is being handled.

    ``transformers`` hands callbacks neither the trainer nor its batches, and asking users to pass it would be a second
    line in every script. The trainer is the caller, so it is read from the call stack; None if that ever fails.
    """
    frame = inspect.currentframe()
    try:
        while frame is not None:
            owner = frame.f_locals.get("self")
            if isinstance(owner, Trainer) and callback in owner.callback_handler.callbacks:
                return owner
            frame = frame.f_back
    finally:
        del frame  # a frame kept in a local variable is a reference cycle
    return None


def _checkpoint_of(args: Any, state: Any) -> Path:
    """The folder of the checkpoint at this step."""
    return Path(args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")


def _note(folder: Path, entry: dict[str, Any], is_writer: bool) -> None:
    if entry and is_writer and folder.is_dir():
        sidecar.note(folder, entry)


def _refuse_replicas(args: Any) -> None:
    """Say before the first step what cannot be recorded: the recorder is handed the model without its wrapper."""
    if args.n_gpu > 1:
        raise ConfigurationError(
            f"Training runs on {args.n_gpu} GPUs under nn.DataParallel, which makes new replicas at every step.",
            fix="start one process per GPU (torchrun, accelerate launch), or set CUDA_VISIBLE_DEVICES to one device.",
        )
    if args.deepspeed is not None:
        raise ConfigurationError(
            "Training runs under DeepSpeed, whose flat partitions of gradients and optimizer state are not recorded.",
            fix="train with DDP or FSDP2.",
        )


def _columns(dataset: Any, id_column: str, source_column: str) -> tuple[Sequence[Any], Sequence[Any] | None] | None:
    names = getattr(dataset, "column_names", None)
    if not isinstance(names, list) or id_column not in names:
        return None
    if not hasattr(dataset, "__len__"):  # reading a stream's column would read the stream, which may have no end
        logger.warning("a stream's column '%s' cannot be followed; ids are content hashes", id_column)
        return None
    return list(dataset[id_column]), list(dataset[source_column]) if source_column in names else None


def _facts(args: Any, trainer: Trainer | None) -> dict[str, Any]:
    settings = ("per_device_train_batch_size", "gradient_accumulation_steps", "num_train_epochs", "max_steps",
                "learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "max_grad_norm", "seed",
                "data_seed", "bf16", "fp16", "optim")  # fmt: skip
    plain = {name: getattr(args, name, None) for name in settings}
    return {
        "trainer": type(trainer).__name__ if trainer is not None else None,
        "settings": {k: v if isinstance(v, int | float | bool | None) else str(v) for k, v in plain.items()},
    }


def _decoder(tokenizer: Any) -> Callable[[Tensor, Tensor | None], list[str]]:
    """Token rows -> texts, with a tokenizer of its own: a fast tokenizer must not be used from two threads."""
    own = copy.deepcopy(tokenizer)

    def decode(tokens: Tensor, mask: Tensor | None) -> list[str]:
        rows = tokens.tolist() if mask is None else [t[m.bool()].tolist() for t, m in zip(tokens, mask, strict=True)]
        return [text[:_TEXT_LIMIT] for text in own.batch_decode(rows, skip_special_tokens=True)]

    return decode
