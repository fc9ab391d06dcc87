"""A gradient scaler's part in a recording: by how much it multiplies losses, and which steps it skips."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from trainer_attrib.capture.optimizer_tap import OptimizerTap, unwrap_optimizer
from trainer_attrib.errors import ConfigurationError


class LossScaling:
    """Watches a gradient scaler by its public calls.

    A scaler skips a step by not calling the optimizer, so that only ``scaler.step`` can tell. It is replaced on the
    instance while the recorder is attached. (An optimizer that is called nevertheless, fused ones, tells by itself.)

    Args:
        scaler: ``torch.amp.GradScaler`` or one like it.
        taps: of the recorded optimizers.

    Raises:
        ConfigurationError: it has no ``scale`` and ``step``.
    """

    def __init__(self, scaler: Any, taps: Sequence[OptimizerTap]) -> None:
        if not all(callable(getattr(scaler, name, None)) for name in ("scale", "step")):
            raise ConfigurationError(
                f"scaler={type(scaler).__name__} has no scale() and step().",
                fix="pass the gradient scaler itself, for instance torch.amp.GradScaler.",
            )
        self._scaler = scaler
        self._taps = {id(tap.optimizer): tap for tap in taps}
        self._replaced: dict[str, Any] | None = None  # what the instance itself had for "step"

    def attach(self) -> None:
        """Watch ``scaler.step``."""
        step = self._scaler.step

        @functools.wraps(step)
        def watched(optimizer: Any, *args: Any, **kwargs: Any) -> Any:
            tap = self._taps.get(id(unwrap_optimizer(optimizer)))
            before = tap.calls if tap else 0
            result = step(optimizer, *args, **kwargs)
            if tap is not None and tap.calls == before:
                tap.skipped()
            return result

        own = vars(self._scaler)
        self._replaced = {"step": own["step"]} if "step" in own else {}
        self._scaler.step = watched

    def detach(self) -> None:
        """Leave the scaler as it was; safe to call twice."""
        if self._replaced is not None:
            vars(self._scaler).pop("step", None)
            vars(self._scaler).update(self._replaced)
            self._replaced = None

    def scale(self, like: Tensor) -> Tensor:
        """By what a loss is multiplied now: 0-dim, on ``like``'s device, without waiting for it."""
        return self._scaler.scale(torch.ones((), device=like.device))


def scaler_of(scaler: Any, optimizer: Any) -> Any:
    """The scaler that was given, else that of accelerate's wrapper around an optimizer; None if there is none."""
    optimizers = optimizer if isinstance(optimizer, Sequence) else [optimizer]
    found = [scaler, *(getattr(each, "scaler", None) for each in optimizers)]
    found = [each for each in found if each is not None and getattr(each, "is_enabled", lambda: True)()]
    return found[0] if found else None
