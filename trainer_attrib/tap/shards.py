"""What one process holds of a parameter: all of it, or a block of its rows (FSDP2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from trainer_attrib.errors import ConfigurationError


@dataclass(frozen=True)
class Shard:
    """``local`` are the entries ``start`` to ``start + len(local)`` along the first axis of a parameter of ``shape``.

    ``distributed`` tells a part from a tensor that every process holds as a whole.
    """

    local: Tensor
    start: int
    shape: tuple[int, ...]
    distributed: bool = False

    @property
    def span(self) -> slice:
        """Along the first axis."""
        return slice(self.start, self.start + self.local.shape[0])


def shard_of(tensor: Tensor) -> Shard:
    """This process's part of a tensor; an ordinary tensor is its own only part.

    Raises:
        ConfigurationError: it is distributed in another way than FSDP2 does over one group of processes.
    """
    placements: Any = getattr(tensor, "placements", None)
    if placements is None:
        return Shard(tensor, 0, tuple(tensor.shape))
    distributed: Any = tensor
    if len(placements) != 1 or not placements[0].is_shard(dim=0):
        raise ConfigurationError(
            f"A parameter is distributed as {tuple(map(str, placements))}; what is recorded is FSDP2's sharding of the "
            "first axis over one group of processes.",
            cause="tensor parallelism, hybrid sharding or a mesh of several dimensions.",
            fix="train with DDP or plain fully_shard, or without recording.",
        )
    start, _ = rows_of(tensor.shape[0], distributed.device_mesh.get_local_rank(), distributed.device_mesh.size())
    return Shard(distributed.to_local(), start, tuple(tensor.shape), distributed=True)


def rows_of(rows: int, place: int, places: int) -> tuple[int, int]:
    """Where the rows of one place begin and end, as ``torch.chunk`` cuts, which is how FSDP2 places them."""
    chunk = -(-rows // places)
    return min(place * chunk, rows), min((place + 1) * chunk, rows)
