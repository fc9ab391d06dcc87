"""The recording's scalars on their way to a tracker: once per occasion, and never a reason for a run to end."""

from __future__ import annotations

from trainer_attrib.capture.messages import logger
from trainer_attrib.capture.recorder import Recorder


class Scalars:
    """Those of one recorder. A fault is said once; after it there are none, while recording and training go on."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder: Recorder | None = recorder

    def now(self) -> dict[str, float]:
        """Names and numbers; {} once the recording is over."""
        try:
            return {} if self._recorder is None else self._recorder.scalars()
        except Exception as fault:
            self.give_up(fault)
            return {}

    def give_up(self, fault: Exception) -> None:
        """There will be no more."""
        self._recorder = None
        logger.warning("nothing more about the recording goes to the tracker: %s: %s", type(fault).__name__, fault)
