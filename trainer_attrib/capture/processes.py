"""The processes that train one model together, and the few moments at which their recorders speak to each other.

Every process writes parts of its own; nothing is exchanged from one step to the next. What needs all of them happens
at steps that each can tell by itself, and a process whose capture failed still takes its turn there: nobody waits for
ever.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor

from trainer_attrib.errors import CaptureError, LedgerError

_LET_GO = 0.02
"""Seconds that pass after a stage's last collective. Gloo's thread lets go of its tensors a moment after the result is
there, and needs the interpreter for it; where the interpreter ended in between (the training's last line is near), the
process aborted: "terminate called without an active exception" (torch 2.13, Python 3.11; docs/log.md)."""


@dataclass
class Processes:
    """Those of ``torch.distributed``'s default group, or this one alone.

    ``broken`` is true once all of them know that one has stopped capturing.
    """

    rank: int = 0
    size: int = 1
    broken: bool = False

    @staticmethod
    def current() -> Processes:
        """The group that is initialized, if one is."""
        if dist.is_available() and dist.is_initialized():
            return Processes(dist.get_rank(), dist.get_world_size())
        return Processes()

    @property
    def leads(self) -> bool:
        """Whether this one keeps the stage's metadata and speaks to the user."""
        return self.rank == 0

    def led(self, work: Callable[[], Any]) -> Any:
        """What ``work`` returns on the leader, on all processes; JSON-ready.

        Raises:
            LedgerError: on the others, if it failed on the leader, where it raises its own error.
        """
        if self.size == 1:
            return work()
        outcome: list[Any] = [None]
        fault: Exception | None = None
        if self.leads:
            try:
                outcome = [{"result": work()}]
            except Exception as error:
                fault, outcome = error, [{"fault": f"{type(error).__name__}: {error}"}]
        dist.broadcast_object_list(outcome, src=0)
        if fault is not None:
            raise fault
        if "fault" in outcome[0]:
            raise LedgerError(f"Process 0 could not open the stage. {outcome[0]['fault']}")
        return outcome[0]["result"]

    def total(self, make: Callable[[], Tensor] | None, like: Tensor, length: int) -> Tensor:
        """Sum over processes of the vector [length] that each makes, on ``like``'s device; None has nothing to give.

        Raises:
            CaptureError: on every process, if one of them had nothing to give; its own fault where making it failed.
        """
        if self.size == 1 and make is not None:
            return make()
        if self.broken:
            raise _stopped()
        fault: Exception | None = None
        packed = like.new_zeros(length + 1)
        try:
            if make is None:
                raise _stopped()
            packed[:-1] = make()
        except Exception as error:
            fault = error
            packed.zero_()
            packed[-1] = 1
        dist.all_reduce(packed)
        self.broken = bool(packed[-1] > 0)
        if self.broken:
            raise fault or _stopped()
        return packed[:-1]

    def agree(self, well: bool) -> bool:
        """Whether all processes are well. Each waits here for the others."""
        if self.size == 1 or self.broken:
            return well and not self.broken
        return all(self.each(lambda: well))

    def each(self, make: Callable[[], Any]) -> list[Any]:
        """What every process makes, by rank; JSON-ready. Each waits here for the others, whatever became of its own.

        Raises:
            LedgerError: on every process, if making it failed on one of them; there it is its own fault.
        """
        if self.size == 1:
            return [make()]
        fault: Exception | None = None
        try:
            mine = {"made": make()}
        except Exception as error:
            fault, mine = error, {"fault": f"{type(error).__name__}: {error}"}
        told: list[Any] = [None] * self.size
        dist.all_gather_object(told, mine)
        time.sleep(_LET_GO)
        failed = [f"rank {rank}: {one['fault']}" for rank, one in enumerate(told) if "fault" in one]
        self.broken = self.broken or bool(failed)
        if fault is not None:
            raise fault
        if failed:
            raise LedgerError(f"Other processes of this training could not write their part. {'; '.join(failed)}")
        return [one["made"] for one in told]


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a part of a distributed tensor (FSDP2)."""
    return hasattr(tensor, "full_tensor")


def _stopped() -> CaptureError:
    return CaptureError(
        "Capture stopped in another process of this training.",
        cause="its own message says why.",
        fix="look at the messages of the other ranks.",
    )
