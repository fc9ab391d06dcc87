"""A Lightning fit as a program's answer: it trains by itself, and can be driven step by step."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from trainer_attrib.analysis.loops import set_epoch
from trainer_attrib.analysis.programs import Step
from trainer_attrib.analysis.thinning import Thinning, windows
from trainer_attrib.errors import ConfigurationError
from trainer_attrib_integrations.averages_lightning import KeptAverages, averaging
from trainer_attrib_integrations.wrapped import Wrapped


class Fit:
    """``programs={"sft": lambda model: Fit(pl.Trainer(...), model, loader)}``, of either of Lightning's packages.

    Driven step by step, ``training_step``, the hooks that move a batch to its device, the precision plugin and
    ``configure_gradient_clipping`` are the module's and the trainer's own; ``self.trainer``, ``self.global_step`` and
    ``self.current_epoch`` say what they would say. No other hook is run (``on_train_epoch_start`` and its like), no
    callback but those that average weights (``WeightAveraging``), no validation, and logging is muted. The module
    trains in the mode in which it is given. The batches of a step are fetched together, before its losses are computed.

    Args:
        trainer: need not have run.
        module: that the program was given.
        train_dataloaders: a ``DataLoader``, or another object that gives batches each time it is iterated over.

    Raises:
        ConfigurationError: the training cannot be driven from outside.
    """

    def __init__(self, trainer: Any, module: Any, train_dataloaders: Any) -> None:
        self.trainer, self.model, self._batches = trainer, module, train_dataloaders
        self._clipped: Optimizer | None = None

    def train(self) -> None:
        """``trainer.fit(module, train_dataloaders)``."""
        self.trainer.fit(self.model, self._batches)

    def steps(self, thin: int = 1) -> Iterator[Step]:
        """The loader's batches, without end; see :class:`~trainer_attrib.analysis.programs.Steps`."""
        trainer, module = self.trainer, self.model
        _refuse_what_cannot_be_driven(trainer, module, self._batches)
        self._connect()
        accumulate = trainer.accumulate_grad_batches
        thinning, taken = Thinning(thin, accumulate), 0
        batches = thinning.of(self._batches)
        limit = batches_of_an_epoch(self._batches, trainer.limit_train_batches)
        for epoch in itertools.count():
            before = taken
            thinning.begin(epoch)
            set_epoch(batches, epoch)
            for number, window in enumerate(windows(batches, accumulate, limit)):
                kept, share = thinning.keep(window)
                scale = accumulate * len(kept) / len(window)  # Lightning divides a shorter last step by as much
                places = range(number * accumulate, number * accumulate + len(kept))
                losses = [
                    FitBatch(trainer, module, batch, index, scale, (epoch, taken))
                    for batch, index in zip(kept, places, strict=True)
                ]
                yield Step(losses, share)
                taken += 1
            if taken == before:
                return

    def clip(self) -> None:
        """Clip the gradients as the module and the trainer say."""
        if self._clipped is None:
            self._clipped = self.optimizer()
        self.model.configure_gradient_clipping(
            self._clipped, self.trainer.gradient_clip_val, self.trainer.gradient_clip_algorithm
        )

    def averages(self) -> KeptAverages | None:
        """See :class:`~trainer_attrib.analysis.programs.Averaging`."""
        if not averaging(self.trainer):
            return None
        batches = batches_of_an_epoch(self._batches, self.trainer.limit_train_batches)
        steps = None if batches is None else -(-batches // self.trainer.accumulate_grad_batches)
        return KeptAverages(self.trainer, self.model, _counted, steps)

    def optimizer(self) -> Optimizer:
        """A new optimizer, by ``configure_optimizers``.

        Raises:
            ConfigurationError: it gives none or several.
        """
        return self.configured()[0]

    def configured(self) -> tuple[Optimizer, Any]:
        """A new optimizer and its schedule, by ``configure_optimizers``; None where there is no schedule.

        Raises:
            ConfigurationError: it gives no optimizer or several.
        """
        self._connect()
        # schedules ask the trainer for its number of steps, which begins to read the loader
        with torch.random.fork_rng():
            self.trainer._data_connector.attach_data(self.model, train_dataloaders=self._batches)
            given = self.model.configure_optimizers()
        found = _optimizers(given)
        if len(found) != 1:
            raise ConfigurationError(
                f"configure_optimizers gave {len(found)} optimizers; steps can be driven from outside with one.",
                fix="let the stage be retrained as a whole.",
            )
        return found[0], _schedule(given)

    def _connect(self) -> None:
        """Give the module its trainer, its device and its precision, as ``fit`` would; safe to do again."""
        self.model.trainer = self.trainer
        self.trainer.strategy.connect(self.model)
        self.model.to(self.trainer.strategy.root_device)
        self.trainer.precision_plugin.convert_module(self.model)


class FitBatch:
    """Computes one micro-batch's loss as ``fit`` would, as often as it is called.

    Args:
        trainer: whose precision it is.
        module: whose loss it is.
        batch: not yet on the device.
        index: of the batch in its epoch.
        scale: what the loss is divided by.
        place: epoch and optimizer step, both counted from 0.
    """

    def __init__(self, trainer: Any, module: Any, batch: Any, index: int, scale: float, place: tuple[int, int]) -> None:
        self._trainer, self._module, self._batch, self._index = trainer, module, batch, index
        self._scale, self._place = scale, place
        self._moved = False

    def __call__(self) -> Tensor:
        """The loss, 0-dim, with its gradient."""
        module, takes_index = self._module, len(inspect.signature(self._module.training_step).parameters) > 1
        with _muted(module), _counted(self._trainer, *self._place):
            batch = self._on_device()
            with self._trainer.precision_plugin.train_step_context():
                found = module.training_step(batch, self._index) if takes_index else module.training_step(batch)
        loss = found.get("loss") if isinstance(found, Mapping) else found
        if not isinstance(loss, Tensor):
            raise ConfigurationError(
                f"training_step gave {type(loss).__name__} as the loss of batch {self._index}, not a tensor.",
                cause="it leaves some batches out, or optimizes by itself.",
                fix="let the stage be retrained as a whole.",
            )
        return loss / self._scale

    def _on_device(self) -> Any:
        """Moved once: what the hooks change at random stays the same."""
        if not self._moved:
            module = self._module
            batch = module.on_before_batch_transfer(self._trainer.precision_plugin.convert_input(self._batch), 0)
            batch = module.transfer_batch_to_device(batch, self._trainer.strategy.root_device, 0)
            self._batch, self._moved = module.on_after_batch_transfer(batch, 0), True
        return self._batch


@contextmanager
def _muted(module: Any) -> Iterator[None]:
    with ExitStack() as stack:
        wrapped = Wrapped()
        stack.callback(wrapped.remove)
        for name in ("log", "log_dict"):
            wrapped.put(module, name, lambda *args, **kwargs: None)
        yield


@contextmanager
def _counted(trainer: Any, epoch: int, step: int) -> Iterator[None]:
    """Let ``current_epoch`` and ``global_step`` say where the step is, and put back what they said."""
    epochs = trainer.fit_loop.epoch_progress.current
    steps = trainer.fit_loop.epoch_loop.automatic_optimization.optim_progress.optimizer.step.total
    before = (epochs.completed, steps.completed)
    epochs.completed, steps.completed = epoch, step
    try:
        yield
    finally:
        epochs.completed, steps.completed = before


def _optimizers(configured: Any) -> list[Optimizer]:
    """The optimizers in what ``configure_optimizers`` may return."""
    if isinstance(configured, Optimizer):
        return [configured]
    if isinstance(configured, Mapping):
        return _optimizers(configured.get("optimizer"))
    if isinstance(configured, list | tuple):
        return list(itertools.chain.from_iterable(map(_optimizers, configured)))
    return []


def _schedule(configured: Any) -> Any:
    """The schedule in what ``configure_optimizers`` may return: itself, or with how often it goes on."""
    if isinstance(configured, Mapping):
        return configured.get("lr_scheduler")
    if isinstance(configured, list | tuple) and len(configured) == 2 and isinstance(configured[1], list | tuple):
        return next(iter(configured[1]), None)
    if isinstance(configured, list | tuple):
        return next((found for one in configured if (found := _schedule(one)) is not None), None)
    return None


def batches_of_an_epoch(batches: Any, limit: int | float) -> int | None:
    """How many batches an epoch has under ``limit_train_batches``; None where a stream does not tell."""
    try:
        length = len(batches)
    except TypeError:  # a stream
        length = None
    if isinstance(limit, int):
        return limit if length is None else min(limit, length)
    return None if length is None else int(length * limit)


def _refuse_what_cannot_be_driven(trainer: Any, module: Any, batches: Any) -> None:
    several = isinstance(batches, list | tuple | Mapping) or not isinstance(batches, Iterable)
    reasons = {
        "it optimizes by itself (automatic_optimization is False)": not module.automatic_optimization,
        "it reads its batches by itself (dataloader_iter)": "dataloader_iter"
        in inspect.signature(module.training_step).parameters,
        "fp16 training scales its losses and leaves steps out": getattr(trainer.precision_plugin, "scaler", None)
        is not None,
        "it trains on several devices or processes": trainer.world_size > 1,
        "overfit_batches replaces the sampler": bool(trainer.overfit_batches),
        "train_dataloaders is not one loader": several or type(batches).__name__ == "CombinedLoader",
    }
    for reason, holds in reasons.items():
        if holds:
            raise ConfigurationError(
                f"This {type(module).__name__} cannot be driven step by step: {reason}.",
                fix="let the program make its trainer without this (bf16 for fp16, one device, one loader), or use a "
                "method that trains the stage as a whole.",
            )
