"""Ray actors, each of which is given the work once and then tasks: on one machine or on a cluster that is there."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from trainer_attrib.errors import MissingExtraError
from trainer_attrib.execution.outcome import Outcome

Task = TypeVar("Task")
Answer = TypeVar("Answer")

_AHEAD = 2  # tasks per actor that are under way before their answers are asked for


class Ray:
    """Tasks dealt out to actors in turn. What work needs travels with it, parts of a ledger are read by path.

    A Ray that runs already is used; otherwise one is started on this machine, without its dashboard and without its
    reports on usage.

    Args:
        workers: actors; as many as Ray has processors by default.

    Raises:
        MissingExtraError: without the extra ``ray``.
    """

    def __init__(self, workers: int | None = None) -> None:
        self._ray = _require()
        if not self._ray.is_initialized():
            os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # nothing leaves this machine
            self._ray.init(num_cpus=workers, include_dashboard=False, logging_level="error", log_to_driver=False)
        self.workers = workers or max(1, int(self._ray.cluster_resources().get("CPU", 1)))

    def map(self, work: Callable[[Task], Answer], tasks: Sequence[Task]) -> Iterator[Answer]:
        """See :meth:`trainer_attrib.execution.runner.Runner.map`."""
        given = self._ray.put(work)
        actors = [self._actor().remote(given) for _ in range(min(self.workers, len(tasks)))]
        waiting: deque[Any] = deque()
        for number, task in enumerate(tasks):
            if len(waiting) == _AHEAD * len(actors):
                yield self._ray.get(waiting.popleft()).get()
            waiting.append(actors[number % len(actors)].do.remote(task))
        while waiting:
            yield self._ray.get(waiting.popleft()).get()

    def once(self, work: Callable[[], Answer]) -> Answer:
        """See :meth:`trainer_attrib.execution.runner.Runner.once`; by the process that asks."""
        return work()

    def _actor(self) -> Any:
        return self._ray.remote(num_cpus=1)(_Actor)


class _Actor:
    def __init__(self, work: Callable[[Any], Any]) -> None:
        self._work = work

    def do(self, task: Any) -> Outcome[Any]:
        return Outcome.of(self._work, task)


def _require() -> Any:
    try:
        import ray
    except ImportError:
        raise MissingExtraError("ray", "ray") from None
    return ray
