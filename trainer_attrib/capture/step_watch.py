"""The optimizers of a stage, and the gradient scaler that may stand before them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from trainer_attrib.capture.loss_scaling import LossScaling, scaler_of
from trainer_attrib.capture.optimizer_tap import OptimizerTap, owners
from trainer_attrib.errors import ConfigurationError


class StepWatch:
    """Tells of every step that one of the optimizers executes, and of every one that a gradient scaler skips.

    Args:
        optimizer: one, or several over disjoint parameters.
        scaler: if the training uses one that accelerate's wrapper does not know.
        after_step: called with the optimizer's number.
        after_skip: called with the optimizer's number.

    Raises:
        ConfigurationError: two optimizers update the same parameter, or the scaler is none.
    """

    def __init__(
        self, optimizer: Any, scaler: Any, after_step: Callable[[int], None], after_skip: Callable[[int], None]
    ) -> None:
        given = optimizer if isinstance(optimizer, Sequence) else [optimizer]
        self._taps = [
            OptimizerTap(each, functools.partial(after_step, number), functools.partial(after_skip, number))
            for number, each in enumerate(given)
        ]
        self.optimizers = [tap.optimizer for tap in self._taps]
        self.owners = owners(self.optimizers)
        scaler = scaler_of(scaler, given)
        self._scaling = None if scaler is None else LossScaling(scaler, self._taps)

    def attach(self) -> None:
        """Register the hooks."""
        for tap in self._taps:
            tap.attach()
        if self._scaling is not None:
            self._scaling.attach()

    def detach(self) -> None:
        """Remove the hooks; safe to call twice."""
        for tap in self._taps:
            tap.detach()
        if self._scaling is not None:
            self._scaling.detach()

    def loss_scale(self, like: Tensor) -> Tensor | None:
        """By what a loss is multiplied now, if it is: 0-dim, on ``like``'s device, without waiting for it."""
        return None if self._scaling is None else self._scaling.scale(like)

    def refuse_compiled(self, traced: bool) -> None:
        """Compiled layers do not tell when a backward pass runs, so that its loss scale is not known.

        Raises:
            ConfigurationError: layers are compiled and losses are scaled.
        """
        if traced and self._scaling is not None:
            raise ConfigurationError(
                "Layers are compiled and a gradient scaler multiplies the losses; rows would carry its scale.",
                fix="train in bfloat16, or without torch.compile.",
            )
