"""Ray actors, each of which is given the work once and then tasks: on one machine or on a cluster that is there."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from trainer_attrib.errors import MissingExtraError
from trainer_attrib.execution.outcome import Outcome
from trainer_attrib.execution.runner import Serial

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
        self._actors: list[Any] = []
        self.workers = workers or max(1, int(self._ray.cluster_resources().get("CPU", 1)))

    def map(self, work: Callable[[Task], Answer], tasks: Sequence[Task]) -> Iterator[Answer]:
        """See :meth:`trainer_attrib.execution.runner.Runner.map`."""
        given, actors = [self._ray.put(work)], self._some(len(tasks))  # in a list, an actor fetches it when it wants
        waiting: deque[Any] = deque()
        for number, task in enumerate(tasks):
            if len(waiting) == _AHEAD * len(actors):
                yield self._ray.get(waiting.popleft()).get()
            waiting.append(actors[number % len(actors)].do.remote(given, task))
        while waiting:
            yield self._ray.get(waiting.popleft()).get()

    def once(self, work: Callable[[], Answer]) -> Answer:
        """See :meth:`trainer_attrib.execution.runner.Runner.once`; by the process that asks."""
        return work()

    def __reduce__(self) -> tuple[type[Serial], tuple[()]]:
        """What work maps inside an actor is done there."""
        return Serial, ()

    def _some(self, wanted: int) -> list[Any]:
        """Actors, which stay: a new one has to import all of torch first."""
        actor = self._ray.remote(_Actor)  # takes a processor to be placed, none to stay: two runners may be there
        self._actors += [actor.remote() for _ in range(len(self._actors), min(self.workers, wanted))]
        return self._actors


class _Actor:
    """Does tasks, and holds on to what they have in common."""

    def __init__(self) -> None:
        self._given: Any = None
        self._work: Any = None

    def do(self, given: list[Any], task: Any) -> Outcome[Any]:
        if self._given != given:
            self._given, self._work = given, _require().get(given[0])
        return Outcome.of(self._work, task)


def _require() -> Any:
    try:
        import ray
    except ImportError:
        raise MissingExtraError("ray", "ray") from None
    return ray
