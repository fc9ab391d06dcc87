"""Where one backward pass ends and the next begins, as the layers that it reaches can tell."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.autograd import Variable


class BackwardPasses:
    """Calls ``begins`` before anything of a backward pass is captured and ``ended`` when its gradients are accumulated.

    Both may be replaced. A pass inside a pass (reentrant checkpointing) belongs to the outer one if a layer was reached
    before it, else it is one of its own, whose gradients are accumulated when it ends.
    """

    def __init__(self) -> None:
        self.begins: Callable[[], None] = _nothing
        self.ended: Callable[[], None] = _nothing
        self._running = False

    def reached(self) -> None:
        """A backward pass has reached a layer."""
        if not self._running:
            self._running = True
            Variable._execution_engine.queue_callback(self._end)  # as DDP does
            self.begins()

    def forward_begins(self) -> None:
        """Forget a backward pass that broke off: no callback tells of its end."""
        self._running = self._running and torch._C._current_graph_task_id() != -1

    def _end(self) -> None:
        self._running = False
        self.ended()


def _nothing() -> None:
    pass
