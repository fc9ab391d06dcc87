"""What became of a task in another process: its answer, or what it raised."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from trainer_attrib.errors import ExecutionError, TrainerAttribError

Task = TypeVar("Task")
Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Outcome(Generic[Answer]):
    """One of the two."""

    answer: Answer | None = None
    fault: Exception | None = None

    @staticmethod
    def of(work: Callable[[Task], Answer], task: Task) -> Outcome[Answer]:
        """Do a task. An exception of this library travels as it is; others, which may hold anything, as their text."""
        try:
            return Outcome(answer=work(task))
        except TrainerAttribError as fault:
            return Outcome(fault=fault)
        except Exception as fault:
            return Outcome(
                fault=ExecutionError(
                    f"A task failed in another process with {type(fault).__name__}: {fault}",
                    fix="run the same with runner='serial' to see where it comes from.",
                )
            )

    def get(self) -> Answer:
        """The answer; raises the fault."""
        if self.fault is not None:
            raise self.fault
        return self.answer  # type: ignore[return-value]  # None may be an answer
