"""The same work in one process, in those that torchrun started, or in Ray's actors: one protocol."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, TypeVar

Task = TypeVar("Task")
Answer = TypeVar("Answer")


class Runner(Protocol):
    """Spreads work over processes.

    What is put together from the answers does not depend on the runner: they come in the order of the tasks, and how
    work is cut into tasks is up to whoever asks. So results are the same to the bit wherever a task gives the same bits
    (the same kind of processor, as many threads).
    """

    @property
    def workers(self) -> int:
        """How many tasks are worked on at once."""
        ...

    def map(self, work: Callable[[Task], Answer], tasks: Sequence[Task]) -> Iterator[Answer]:
        """The answers in the order of the tasks. What a task raises is raised here, that of the first one.

        A task that maps in turn does so within its own process.

        Args:
            work: changes nothing that anybody else reads; its process may be another one.
            tasks: small, since they travel, as the answers do.
        """
        ...

    def once(self, work: Callable[[], Answer]) -> Answer:
        """What only one process must do, such as writing a file. All of them go on when it is done, with its answer."""
        ...


class Serial:
    """Everything here, one task after the other; each begins when its answer is asked for."""

    workers = 1

    def map(self, work: Callable[[Task], Answer], tasks: Sequence[Task]) -> Iterator[Answer]:
        """See :meth:`Runner.map`."""
        return map(work, tasks)

    def once(self, work: Callable[[], Answer]) -> Answer:
        """See :meth:`Runner.once`."""
        return work()
