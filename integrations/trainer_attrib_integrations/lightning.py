"""The callback for Lightning's Trainer, under both of its import names: begins, names and ends a recording."""

from __future__ import annotations

import importlib
import math
import os
import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from trainer_attrib.capture.messages import logger
from trainer_attrib.capture.processes import Processes
from trainer_attrib.capture.recorder import Recorder
from trainer_attrib.capture.shadows.refusals import Asked, asked_shadows
from trainer_attrib.errors import ConfigurationError, MissingExtraError
from trainer_attrib.ledger.journal import check_place
from trainer_attrib.ledger.resuming import place_to_begin
from trainer_attrib.types import SketchConfig
from trainer_attrib_integrations.scalars_lightning import LoggedScalars
from trainer_attrib_integrations.shadows_lightning import OfferedBatches
from trainer_attrib_integrations.wrapped import Wrapped


def _callback_class() -> Any:
    """The base class of the package that is loaded, else of one that is installed.

    There are two, but a trainer of either package takes a callback of the other, whose events it calls by name.
    """
    missing: ImportError | None = None
    for name in sorted(("lightning.pytorch", "pytorch_lightning"), key=lambda name: sys.modules.get(name) is None):
        try:
            return importlib.import_module(name).Callback
        except ImportError as error:
            missing = missing or error
    raise MissingExtraError("lightning", "lightning") from missing


if TYPE_CHECKING:
    from lightning.pytorch import Callback
else:
    Callback = _callback_class()


class AttributionCallback(Callback):
    """Record a training stage: ``Trainer(..., callbacks=[AttributionCallback("runs/digits", stage="first")])``.

    Examples are named by ``batch[id_key]`` if batches are dicts that have it (strings, integers or a tensor of them),
    else by a hash of their content: of the main input if it has a usual name, else of the batch's largest tensor.

    Args:
        ledger: directory or fsspec URL, the same for all stages of a model.
        stage: name of this stage, new in the ledger. A second ``fit`` with the same callback becomes ``stage.2``. With
            ``fit(ckpt_path=...)`` a stage of this name that broke off is gone on with: the checkpoint says where.
        sketch: how gradients are compressed.
        snapshots: how many snapshots inside the stage, beside its start and end.
        strict: raise capture faults; otherwise they are reported once and training goes on.
        shadow: earlier stages without which weights are trained along, by name or as :class:`types.Shadow`
            (docs/recording.md).
        id_key: key of a dict batch with a unique name per example.
        source_key: key of a dict batch that says where each example comes from.

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
        id_key: str = "id",
        source_key: str = "source",
    ) -> None:
        check_place(ledger, stage)
        self._ledger, self._stage, self._attempts = ledger, stage, 0
        self._options: dict[str, Any] = {
            "sketch": sketch, "snapshots": snapshots, "strict": strict, "shadow": asked_shadows(shadow),
        }  # fmt: skip
        self._keys = (id_key, source_key)
        self._recorder: Recorder | None = None
        self._left: dict[str, Any] = {}  # what a stage that broke off would have noted
        self._noted: dict[str, Any] = {}  # by the checkpoint that training resumes from
        self._offered: OfferedBatches | None = None  # where there are shadows
        self._scalars: LoggedScalars | None = None
        self._wrapped = Wrapped()
        self._batch = ExitStack()  # holds the recorder's block from a batch's start to its end

    # ---- a stage ------------------------------------------------------------------------------------------------

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Open the stage."""
        self._stop("training was started again")
        if trainer.fast_dev_run:
            logger.info("a fast_dev_run is not recorded")
            return
        _refuse_what_cannot_be_recorded(trainer)
        name = self._stage if self._attempts == 0 else f"{self._stage}.{self._attempts + 1}"
        stage, after_step = Processes.current().led(
            lambda: place_to_begin(self._ledger, name, self._noted, trainer.global_step)
        )
        self._noted = {}
        self._attempts += after_step == 0
        recorder = Recorder(
            self._ledger,
            stage=stage,
            model=pl_module,
            optimizer=trainer.optimizers,
            scaler=getattr(trainer.precision_plugin, "scaler", None),
            total_steps=_total_steps(trainer, after_step),
            facts=_facts(trainer, pl_module),
            **self._options,
        )
        offered = OfferedBatches(recorder, trainer, pl_module) if recorder.shadows else None
        self._recorder = recorder.start(after_step=after_step)
        if offered is not None:
            offered.install()
        self._offered, self._scalars = offered, LoggedScalars(recorder)
        if trainer.global_step and not after_step:
            logger.info(
                "stage '%s' begins after step %d of the training; what came before is not in it",
                stage,
                trainer.global_step,
            )
        if trainer.gradient_clip_algorithm != "value":
            self._recorder.clip_threshold = trainer.gradient_clip_val or None

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Close the stage, once all callbacks have had this event: those that average weights put the averages into
        the module in it. The strategy has it last, and only then moves the module away from its device."""
        self._leave()
        if self._recorder is not None:
            self._wrapped.put(trainer.strategy, "on_train_end", self._finishing(trainer.strategy.on_train_end))

    def _finishing(self, on_train_end: Callable[[], None]) -> Callable[[], None]:
        def finishing() -> None:
            self._wrapped.remove()
            on_train_end()
            if self._recorder is not None:
                self._recorder.finish()

        return finishing

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Close a stage that broke off."""
        self._stop(f"{type(exception).__name__}: {exception}")

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Close whatever is still open."""
        self._stop("training ended without telling its callbacks")

    # ---- checkpoints --------------------------------------------------------------------------------------------

    @property
    def state_key(self) -> str:
        """What this callback's state is called in a checkpoint: its own for each ledger and stage."""
        return self._generate_state_key(ledger=os.fspath(self._ledger), stage=self._stage)

    def state_dict(self) -> dict[str, Any]:
        """Which stage is being recorded, and up to which step."""
        return self._recorder.checkpoint() if self._recorder is not None else self._left

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Called before training resumes from a checkpoint."""
        self._noted = state_dict

    def _leave(self) -> None:
        """Leave module and trainer as they were."""
        self._batch.close()
        self._wrapped.remove()
        if self._offered is not None:
            self._offered.remove()
        self._offered = self._scalars = None

    def _stop(self, reason: str) -> None:
        self._leave()
        if self._recorder is not None:
            self._recorder.interrupt(reason)
            self._left = self._recorder.checkpoint()  # a checkpoint may yet be saved, on the way out
        self._recorder = None

    # ---- a micro-batch ------------------------------------------------------------------------------------------

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Name the examples of the forward passes to come."""
        self._batch.close()
        if self._recorder is not None:
            self._recorder.epoch = trainer.current_epoch + batch_idx / trainer.num_training_batches
            ids, sources, content = _split(batch, *self._keys)
            self._batch.enter_context(self._recorder.batch(ids, sources=sources, content=content))

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Tensor) -> None:
        """Note the loss as it is backpropagated. At the batch's end it would be too late: the step has been taken."""
        if self._recorder is not None:
            scaler = getattr(trainer.precision_plugin, "scaler", None)
            self._recorder.note_loss(loss if scaler is None else loss.detach() / scaler.scale(torch.ones_like(loss)))

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        """Compare gradients with those of the shadows, before the step is taken."""
        if self._offered is not None:
            self._offered.offer()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """The batch is over."""
        self._batch.close()
        if self._scalars is not None:
            self._scalars.log(trainer)


def _refuse_what_cannot_be_recorded(trainer: Any) -> None:
    """Raises ConfigurationError before the first step."""
    if not trainer.optimizers:
        raise ConfigurationError(
            "configure_optimizers returned no optimizer; a stage records the steps of one or several.",
            fix="return the optimizers, or train without the callback.",
        )


def _split(batch: Any, id_key: str, source_key: str) -> tuple[Any, Any, Any]:
    """Ids, sources, and the batch without them."""
    if not isinstance(batch, Mapping):
        return None, None, batch
    content = {key: value for key, value in batch.items() if key not in (id_key, source_key)}
    return batch.get(id_key), batch.get(source_key), content


def _total_steps(trainer: Any, after_step: int) -> int | None:
    """Optimizer steps from the stage's beginning to its end, if Lightning can tell."""
    try:
        total = trainer.estimated_stepping_batches
    except Exception:  # a schedule of accumulate_grad_batches
        return None
    if not math.isfinite(total) or total * len(trainer.optimizers) <= trainer.global_step:
        return None
    steps = int(total) * len(trainer.optimizers)  # Lightning counts batches as if one optimizer took a step in each
    return (steps if trainer.max_steps == -1 else min(steps, trainer.max_steps)) - trainer.global_step + after_step


def _facts(trainer: Any, pl_module: Any) -> dict[str, Any]:
    settings = ("max_epochs", "max_steps", "accumulate_grad_batches", "gradient_clip_val", "gradient_clip_algorithm",
                "precision")  # fmt: skip
    plain = {name: getattr(trainer, name, None) for name in settings}
    plain["automatic_optimization"] = pl_module.automatic_optimization
    return {
        "trainer": f"{type(trainer).__module__.partition('.')[0]}.{type(trainer).__name__}",
        "settings": {k: v if isinstance(v, int | float | bool | None) else str(v) for k, v in plain.items()},
    }
