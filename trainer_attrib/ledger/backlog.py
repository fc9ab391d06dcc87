"""What waits to be written, and how much of it may."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable

Work = Callable[[], None]


class Backlog:
    """Work for one thread, in order, bounded by the bytes that it holds on to until it is done.

    Args:
        most: bytes that may wait or be worked on. Work that holds more than that waits until it is alone.
    """

    def __init__(self, most: int) -> None:
        self._most, self._held = most, 0
        self._waiting: deque[tuple[Work | None, int]] = deque()
        self._unfinished = 0
        self._changed = threading.Condition()

    def fits(self, size: int) -> bool:
        """Whether so many bytes more would leave half of the room to others, or be alone."""
        with self._changed:
            return not self._held or self._held + size <= self._most // 2

    def put(self, work: Work | None, size: int = 0) -> None:
        """Add work, once there is room for what it holds; None for the end."""
        with self._changed:
            self._changed.wait_for(lambda: not self._held or self._held + size <= self._most)
            self._waiting.append((work, size))
            self._held, self._unfinished = self._held + size, self._unfinished + 1
            self._changed.notify_all()

    def run(self, call: Callable[[Work], None]) -> None:
        """Call all work until the end comes."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting)
                work, size = self._waiting.popleft()
            if work is not None:
                call(work)
            with self._changed:
                self._held, self._unfinished = self._held - size, self._unfinished - 1
                self._changed.notify_all()
            if work is None:
                return

    def join(self) -> None:
        """Wait until everything that was put is done."""
        with self._changed:
            self._changed.wait_for(lambda: not self._unfinished)
