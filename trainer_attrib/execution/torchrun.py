"""The processes that torchrun or accelerate started: all ask the same, each does its part, all have the answers."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch.distributed as dist

from trainer_attrib.errors import ConfigurationError
from trainer_attrib.execution.outcome import Outcome
from trainer_attrib.execution.size import held_bytes

Task = TypeVar("Task")
Answer = TypeVar("Answer")

_LAUNCHED = (
    "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID",
)  # fmt: skip
_SHORT, _LONG = 4, 32  # tasks of each rank before ranks wait for each other
_HELD = 16 << 20  # bytes of answers in one round, as far as they can be told from those of the round before


class Torchrun:
    """Tasks dealt out to the ranks of a process group in turn.

    Every process runs the same script up to the same question. Answers travel through a group of their own on the CPU
    (gloo), in rounds of a few tasks per rank, so that no more than these are held: of more tasks where answers are
    small, since ranks wait for the slowest of them at the end of each round.

    Raises:
        ConfigurationError: torchrun did not start this process.
    """

    def __init__(self) -> None:
        if not dist.is_initialized():
            if "RANK" not in os.environ:
                raise ConfigurationError(
                    "runner='torchrun' in a process of which no other is known.",
                    cause="the script was started with python.",
                    fix="torchrun --nproc-per-node 2 script.py, with the same script in every process.",
                )
            dist.init_process_group("gloo")
        self._group = dist.new_group(backend="gloo")
        self._rank, self.workers = dist.get_rank(), dist.get_world_size()
        self._inside = False

    def map(self, work: Callable[[Task], Answer], tasks: Sequence[Task]) -> Iterator[Answer]:
        """See :meth:`trainer_attrib.execution.runner.Runner.map`."""
        if self._inside:
            yield from map(work, tasks)
            return
        first, each = 0, _SHORT
        while first < len(tasks):
            dealt = range(first, min(first + each * self.workers, len(tasks)))
            with self._alone():
                mine = [Outcome.of(work, tasks[number]) for number in dealt[self._rank :: self.workers]]
            found = self._exchanged(mine)
            first, each = dealt.stop, _next_round(found)  # the same on all ranks, as all have all answers
            for place in range(len(dealt)):
                yield found[place % self.workers][place // self.workers].get()

    def once(self, work: Callable[[], Answer]) -> Answer:
        """See :meth:`trainer_attrib.execution.runner.Runner.once`; by rank 0."""
        if self._inside:
            return work()
        return next(self.map(lambda _: work(), [0]))

    def _exchanged(self, mine: list[Outcome[Answer]]) -> list[list[Outcome[Answer]]]:
        found: list[Any] = [None] * self.workers
        dist.all_gather_object(found, mine, group=self._group)
        return found

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """A task that trains (a stage run again) must not take the other ranks, busy with other tasks, for its own."""
        hidden = {name: os.environ.pop(name) for name in _LAUNCHED if name in os.environ}
        self._inside = True
        try:
            yield
        finally:
            self._inside = False
            os.environ.update(hidden)


def _next_round(found: list[list[Outcome[Any]]]) -> int:
    """How many tasks each rank is given next."""
    largest = max(1, *(held_bytes(outcome.answer) for answers in found for outcome in answers))
    return int(min(_LONG, max(_SHORT, _HELD // (largest * len(found)))))
