"""Lightning's averaged weights (EMA, SWA by ``WeightAveraging``) where a fit is driven step by step."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

_CLASSES = tuple(
    f"{package}.callbacks.weight_averaging.WeightAveraging" for package in ("lightning.pytorch", "pytorch_lightning")
)


class KeptAverages:
    """Lets a trainer's own callbacks average, by the events that a fit would tell them of.

    Args:
        trainer: whose callbacks they are.
        module: that is trained, standing where the stage begins.
        counted: ``(trainer, epoch, step)`` -> a block in which the trainer says that it is there.
        epoch_steps: optimizer steps of an epoch; None where a stream does not tell, which leaves out averages that are
            taken at the end of an epoch.
    """

    def __init__(
        self,
        trainer: Any,
        module: Any,
        counted: Callable[[Any, int, int], AbstractContextManager[None]],
        epoch_steps: int | None,
    ) -> None:
        self._trainer, self._module, self._counted, self._epoch_steps = trainer, module, counted, epoch_steps
        self._callbacks = averaging(trainer)
        for callback in self._callbacks:
            callback.setup(trainer, module, "fit")

    def after_step(self, step: int) -> None:
        """See :meth:`~trainer_attrib.analysis.programs.Averages.after_step`."""
        epoch, place = divmod(step - 1, self._epoch_steps) if self._epoch_steps else (0, step - 1)
        with self._counted(self._trainer, epoch, step):
            for callback in self._callbacks:
                callback.on_train_batch_end(self._trainer, self._module, None, None, place)
                if self._epoch_steps and place + 1 == self._epoch_steps:
                    callback.on_train_epoch_end(self._trainer, self._module)

    def put(self) -> None:
        """See :meth:`~trainer_attrib.analysis.programs.Averages.put`."""
        for callback in self._callbacks:
            callback.on_train_end(self._trainer, self._module)


def averaging(trainer: Any) -> list[Any]:
    """A trainer's callbacks that average weights."""
    return [callback for callback in trainer.callbacks if any(map(_averages, type(callback).__mro__))]


def _averages(base: type) -> bool:
    return f"{base.__module__}.{base.__qualname__}" in _CLASSES
