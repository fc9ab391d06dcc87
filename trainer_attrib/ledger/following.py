"""The journal of a stage in every process but the one that keeps it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from trainer_attrib.ledger.journal import Beside, StageJournal, Tensors
from trainer_attrib.ledger.links import Described
from trainer_attrib.ledger.schema import FORMAT, ending_name
from trainer_attrib.ledger.storage import Storage


class FollowingJournal(StageJournal):
    """Counts along with the journal that process 0 writes. Writes its part of sharded snapshots, and a word where the
    recording broke off: process 0 may be gone.

    Args:
        rank: of this process.
    """

    def __init__(self, storage: Storage, name: str, trainable: set[str], meta: dict[str, Any], rank: int) -> None:
        super().__init__(storage, name, trainable, meta)
        self._rank = rank

    def update(self, **changes: Any) -> None:
        """Change entries of the copy in memory."""
        self.meta.update(changes)

    def snapshot(self, name: str, step: int, weights: Tensors, beside: Beside | None = None) -> None:
        """This process's part where weights are sharded; nothing of weights that are the same everywhere."""
        if self.meta["sharded"]:
            super().snapshot(name, step, weights, beside)

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
        weights: Tensors | None,
        described: Described | None = None,
        merged: Iterable[tuple[str, Tensor]] = (),
        beside: Beside | None = None,
    ) -> None:
        """This process's part of the last snapshot; process 0 closes the stage. Without one, why it broke off."""
        if weights is not None:
            return self.snapshot("end", step, weights, beside)
        said = {"format": FORMAT, "attempt": len(self.meta["resumed"]), "step": step, "reason": reason}
        self._storage.write_json(f"{self._folder}/{ending_name(self._rank)}", said)
