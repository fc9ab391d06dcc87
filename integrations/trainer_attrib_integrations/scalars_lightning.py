"""The recording's scalars in the loggers of a Lightning Trainer.

They go to the loggers directly, as those of Lightning's own ``DeviceStatsMonitor`` and ``LearningRateMonitor`` do, at
the steps and with the step numbers of what the module logs (Lightning 2.6). ``pl_module.log`` would enter them into
``callback_metrics``, from which checkpoints and early stopping choose, and into the state of the loops, which
checkpoints hold.
"""

from __future__ import annotations

from typing import Any

from trainer_attrib.capture.recorder import Recorder
from trainer_attrib_integrations.scalars import Scalars


class LoggedScalars(Scalars):
    """Those of one recorder, logged when its trainer logs."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__(recorder)
        self._recorded, self._seen = recorder, recorder.step

    def log(self, trainer: Any) -> None:
        """At the end of a batch: give them to every logger, if a step was taken at which the trainer logs."""
        try:
            stepped, self._seen = self._recorded.step > self._seen, self._recorded.step
            if stepped and trainer.loggers and trainer.is_global_zero and _logs_now(trainer) and (known := self.now()):
                for logger in trainer.loggers:
                    logger.log_metrics(known, step=_step_of(trainer))
        except Exception as fault:
            self.give_up(fault)


def _logs_now(trainer: Any) -> bool:
    every = trainer.log_every_n_steps
    return every > 0 and (_step_of(trainer) + 1) % every == 0


def _step_of(trainer: Any) -> int:
    """The number under which the trainer logs what its module logs: it counts batches that took steps, from 0.

    It has no public name; ``global_step - 1`` is the same number where one optimizer steps once per batch.
    """
    counted = getattr(trainer.fit_loop.epoch_loop, "_batches_that_stepped", None)
    return max(trainer.global_step - 1, 0) if counted is None else counted
