"""The journal of a stage in every process but the one that keeps it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from trainer_attrib.ledger.journal import Beside, StageJournal


class FollowingJournal(StageJournal):
    """Counts along with the journal that process 0 writes, and writes nothing."""

    def update(self, **changes: Any) -> None:
        """Change entries of the copy in memory."""
        self.meta.update(changes)

    def snapshot(self, name: str, step: int, weights: dict[str, Tensor], beside: Beside | None = None) -> None:
        """Nothing: the weights are the same everywhere, or were put together in process 0."""

    def second_moment(self, step: int, factors: dict[str, tuple[Tensor, Tensor]]) -> int:
        """The number that process 0 gives this version."""
        self.meta["versions"] = [
            *self.meta["versions"],
            {"version": len(self.meta["versions"]) + 1, "after_step": step},
        ]
        return len(self.meta["versions"])

    def end(
        self,
        status: str,
        reason: str,
        step: int,
        weights: dict[str, Tensor] | None,
        merged: Iterable[tuple[str, Tensor]] = (),
        beside: Beside | None = None,
    ) -> None:
        """Nothing: process 0 closes the stage."""
