"""How much of a step's time capture takes: said after the first steps and when the stage ends."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from trainer_attrib.tap.module_tap import ModuleTap

STEPS = 10


class Meter:
    """Compares the time spent inside the recorder's hooks with the rest, from step 2 on (the first pays for set-up).

    On a GPU this is the time of the host, which only launches the work. In compiled code it cannot be told apart.
    """

    def __init__(self) -> None:
        self._step, self._began, self._spent = 0, 0.0, 0.0

    @contextmanager
    def own(self) -> Iterator[None]:
        """Count the block as the recorder's own time."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self._spent += time.perf_counter() - began

    def after_step(self, tap: ModuleTap) -> float | None:
        """The share so far, once, after step 10; None otherwise or if not known."""
        self._step += 1
        if self._step == 1:
            self._began, self._spent, tap.seconds = time.perf_counter(), 0.0, 0.0
        return self.share(tap) if self._step == STEPS else None

    def share(self, tap: ModuleTap) -> float | None:
        """The recorder's share of the training's own time so far; None if it is not known."""
        if self._step < 2 or tap.traced:
            return None
        spent = self._spent + tap.seconds
        return spent / max(time.perf_counter() - self._began - spent, 1e-9)
