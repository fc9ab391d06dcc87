"""Shadows of a stage that Lightning trains: how its loss is computed again on a part of a batch."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from trainer_attrib.capture.recorder import Recorder
from trainer_attrib.capture.shadows.parts import PartLoss
from trainer_attrib.capture.shadows.refusals import refuse
from trainer_attrib_integrations.wrapped import Wrapped, replaced


class OfferedBatches:
    """Offers each batch to the recorder's shadows once it was backpropagated.

    Args:
        recorder: before its start.
        trainer: fitting.
        module: trained by it.

    Raises:
        ConfigurationError: shadows cannot follow this training.
    """

    def __init__(self, recorder: Recorder, trainer: Any, module: Any) -> None:
        _refuse_what_cannot_be_followed(trainer, module)
        self._recorder, self._trainer, self._module = recorder, trainer, module
        self._training_step = module.training_step
        self._given: tuple[Any, ...] = ()  # to the training step: the batch, and perhaps its index
        self._wrapped = Wrapped()

    def install(self) -> None:
        """Begin to watch the training step and the clipping."""
        plugin = self._trainer.precision_plugin
        self._wrapped.put(self._module, "training_step", self._remembering())
        self._wrapped.put(plugin, "clip_grad_by_norm", self._telling(plugin.clip_grad_by_norm))

    def remove(self) -> None:
        """Leave module and trainer as they were; safe to call twice."""
        self._wrapped.remove()
        self._given = ()

    def offer(self) -> None:
        """A batch was backpropagated."""
        if not self._given:
            return
        (batch, *rest), self._given = self._given, ()

        def loss_of(part: Any) -> Tensor:
            context = self._trainer.precision_plugin.train_step_context()
            with replaced(self._module, log=_nothing, log_dict=_nothing), context:
                found = self._training_step(part, *rest)
            return (found["loss"] if isinstance(found, Mapping) else found) / self._trainer.accumulate_grad_batches

        self._recorder.shadows.offer(PartLoss(batch, loss_of))

    def _remembering(self) -> Any:
        @functools.wraps(self._training_step)
        def remembering_step(*given: Any, **named: Any) -> Any:
            self._given = given  # by position, when Lightning calls it
            self._recorder.shadows.remember()
            return self._training_step(*given, **named)

        return remembering_step

    def _telling(self, clip: Any) -> Any:
        @functools.wraps(clip)
        def telling_clip(optimizer: Any, clip_val: float) -> None:
            gradients = [p.grad for p in self._trainer.precision_plugin.main_params(optimizer) if p.grad is not None]
            self._recorder.note_gradient_norm(torch.nn.utils.get_total_norm(gradients), float(clip_val))
            clip(optimizer, clip_val)

        return telling_clip


def _nothing(*args: Any, **kwargs: Any) -> None:
    """In place of what logs."""


def _refuse_what_cannot_be_followed(trainer: Any, module: Any) -> None:
    base = next(kind for kind in type(module).__mro__ if kind.__name__ == "LightningModule")
    own = [
        name
        for name in ("backward", "configure_gradient_clipping")
        if getattr(type(module), name) is not getattr(base, name)
    ]
    if not module.automatic_optimization:
        refuse("it optimizes by itself (automatic_optimization is False)", "let Lightning optimize")
    if own:
        refuse(f"{type(module).__name__} has a {own[0]} of its own", "leave it to Lightning")
    if trainer.gradient_clip_algorithm == "value" and trainer.gradient_clip_val:
        refuse("gradients are clipped by value", 'set gradient_clip_algorithm="norm"')
    if "dataloader_iter" in inspect.signature(module.training_step).parameters:
        refuse("the module reads its batches by itself (dataloader_iter)", "take them from Lightning")
    if getattr(module, "_compiler_ctx", None) is not None:
        refuse("the module is compiled", "do not compile it")
