"""The recording's scalars in what a ``transformers.Trainer`` reports to TensorBoard, W&B, Trackio, MLflow and others.

There is no place for a callback to do this by itself. The trainer first copies what it logs to ``state.log_history``,
then calls ``on_log`` of all callbacks in order: reporters, the user's, the one that prints. So a callback that adds to
``logs`` in its own ``on_log`` reaches the printer and no reporter; one that calls ``trainer.log`` is called again by
it, adds to ``log_history`` and so to every checkpoint, and makes reporters and users' callbacks see an event that was
none. Hence ``on_log`` of the *others* is replaced while recording (transformers 5.23, ``Trainer.log`` and
``CallbackHandler.call_event``). They see their usual event with some entries more. The history, the metrics that
``train`` returns and the console do not change.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback

from trainer_attrib.capture.recorder import Recorder
from trainer_attrib_integrations.scalars import Scalars
from trainer_attrib_integrations.wrapped import Wrapped

_OF_TRAINING = {"loss", "train_loss"}  # the trainer's entries at a step, and at the end; evaluations are left alone


def show_scalars(recorder: Recorder, trainer: Trainer, wrapped: Wrapped) -> None:
    """Give the scalars to every callback that listens to what is logged, the trainer's reporters and the user's own."""
    scalars = _OncePerEvent(recorder)
    for callback in trainer.callback_handler.callbacks:
        if type(callback).on_log is not TrainerCallback.on_log and not _prints(callback):
            wrapped.put(callback, "on_log", _with(scalars, callback.on_log))


def _prints(callback: TrainerCallback) -> bool:
    """Whether it only writes to the console or a notebook, where they would be noise."""
    named = type(callback).__name__.endswith("ProgressCallback")  # TRL's and the notebook's, which may not be loaded
    return named or isinstance(callback, PrinterCallback | ProgressCallback)


class _OncePerEvent(Scalars):
    """All callbacks of an event are handed the same dict, and shall see the same scalars."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__(recorder)
        self._logs: dict[str, Any] | None = None
        self._scalars: dict[str, float] = {}

    def beside(self, logs: dict[str, Any]) -> dict[str, float]:
        """What belongs beside these entries."""
        if logs is not self._logs:
            self._logs, self._scalars = logs, self.now() if _OF_TRAINING & logs.keys() else {}
        return self._scalars


def _with(scalars: _OncePerEvent, on_log: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(on_log)
    def seeing_more(*args: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> Any:
        more = scalars.beside(logs) if logs else {}
        if not more or logs is None:
            return on_log(*args, logs=logs, **kwargs)
        shown = {**logs, **more}
        try:
            return on_log(*args, logs=shown, **kwargs)
        finally:  # some take out or add entries, which the callbacks after them and the trainer then see
            kept = {name: value for name, value in shown.items() if name not in more or name in logs}
            logs.clear()
            logs.update(kept)

    return seeing_more
