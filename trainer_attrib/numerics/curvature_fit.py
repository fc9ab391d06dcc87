"""Curvature fitted to rows whose outer products add up to it, and its response to a force, block by block."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

WHOLE = 1 << 27  # bytes that blocks may take before only their diagonals are kept
FLATTENED = 0.1
"""Share of the damping that diagonals take, unless said otherwise. A diagonal in coordinates that are only nearly the
curvature's own mixes large eigenvalues into small ones, which then need less (docs/log.md has how it was measured)."""
FIRST = 64  # rows that say which columns have the largest curvature


def fit_whole(sizes: Sequence[int], bytes_each: int, room: int = WHOLE) -> bool:
    """Whether matrices of blocks of so many columns fit into memory."""
    return sum(size**2 for size in sizes) * bytes_each <= room


class CurvatureFit:
    """One matrix per block of columns. Blocks are whole where they fit into memory; else their diagonals are kept,
    which is all where the coordinates are the curvature's eigenvectors (George et al. 2018, "EK-FAC"). That they
    are not quite costs most where curvature is largest: ``leading`` columns of each block are kept as a whole then.

    Args:
        spans: the columns of each block.
        like: a tensor with the rows' dtype and device.
        room: bytes that whole blocks may take.
        leading: how many columns of each block are kept whole where the blocks are not; only :meth:`respond` asks them.
        flattened: share of the damping that diagonals take.
    """

    def __init__(
        self,
        spans: Sequence[slice],
        like: Tensor,
        room: int = WHOLE,
        leading: int = 0,
        flattened: float = FLATTENED,
    ) -> None:
        self.spans, self.flattened, sizes = list(spans), flattened, [span.stop - span.start for span in spans]
        self.whole = fit_whole(sizes, like.element_size(), room)
        self._sums = [like.new_zeros(size, size) if self.whole else like.new_zeros(size) for size in sizes]
        self._leading = None if self.whole or not leading else _Leading(self.spans, leading)

    def add(self, rows_NK: Tensor) -> None:
        """Take in rows."""
        for total, span in zip(self._sums, self.spans, strict=True):
            block_NK = rows_NK[:, span]
            total += block_NK.T @ block_NK if self.whole else block_NK.square().sum(0)
        if self._leading is not None:
            self._leading.add(rows_NK)

    def respond(self, forces_QK: Tensor, count: int, damping: float | None) -> Tensor:
        """(A + damping)^(-1) f for each force, [Q, K].

        Where a unit of gradient is measured by how far training moved a weight along it, the damping is 1, plus what
        weight decay adds: what training did not have the time to learn, it does not respond to (Bae et al. 2022, "If
        influence functions are the answer, then what is the question?", for the proximal problem that this solves;
        Ali et al. 2019, "A continuous-time view of early stopping for least squares regression", theorem 1, for
        stopping after a time t as a proximity of 1 / t).

        Args:
            forces_QK: in the rows' coordinates.
            count: A is the sum of the rows' outer products over this.
            damping: in A's units; None: a tenth of the mean of each block's eigenvalues, as is usual.
        """
        found_QK = torch.zeros_like(forces_QK)
        for span, curvature in self.blocks(count, damping):
            if self.whole:
                found_QK[:, span] = torch.cholesky_solve(forces_QK[:, span].T, torch.linalg.cholesky(curvature)).T
            else:
                found_QK[:, span] = forces_QK[:, span] / curvature
        if self._leading is not None:
            self._leading.respond(forces_QK, count, damping, found_QK)
        return found_QK

    def blocks(self, count: int, damping: float | None) -> Iterator[tuple[slice, Tensor]]:
        """A + damping of each block, [K, K], or its diagonal [K] where that is what is kept. Blocks that nothing
        reached have no curvature, and no force either: they are left out. See :meth:`respond`."""
        for total, span in zip(self._sums, self.spans, strict=True):
            diagonal_K = (total.diagonal() if self.whole else total) / count
            slack = _slack(diagonal_K, damping, 1.0 if self.whole else self.flattened)
            if slack > 0:
                curvature = total / count
                (curvature.diagonal() if self.whole else curvature).add_(slack)
                yield span, curvature


class _Leading:
    """The columns with the largest curvature of each block, as whole matrices. Which they are, the first rows say."""

    def __init__(self, spans: Sequence[slice], count: int) -> None:
        self._spans, self._count = spans, count
        self._first: list[Tensor] = []
        self._columns: list[Tensor] = []  # of each block, in the rows' numbering
        self._sums: list[Tensor] = []

    def add(self, rows_NK: Tensor) -> None:
        """Take in rows."""
        if self._columns:
            self._sum(rows_NK)
            return
        self._first.append(rows_NK)
        if sum(map(len, self._first)) >= FIRST:
            self._choose()

    def respond(self, forces_QK: Tensor, count: int, damping: float | None, found_QK: Tensor) -> None:
        """Put the responses of these columns into ``found_QK``; see :meth:`CurvatureFit.respond`."""
        if not self._columns:
            self._choose()
        for total, columns in zip(self._sums, self._columns, strict=True):
            curvature = total / count
            slack = _slack(curvature.diagonal(), damping, 1.0)
            if slack > 0:
                curvature.diagonal().add_(slack)
                found_QK[:, columns] = torch.cholesky_solve(forces_QK[:, columns].T, torch.linalg.cholesky(curvature)).T

    def _choose(self) -> None:
        rows_NK, self._first = torch.cat(self._first), []
        energy_K = rows_NK[:FIRST].square().sum(0)  # of so many rows, however they were batched
        for span in self._spans:
            largest = energy_K[span].topk(min(self._count, span.stop - span.start)).indices
            self._columns.append(span.start + largest)
            self._sums.append(rows_NK.new_zeros(len(largest), len(largest)))
        self._sum(rows_NK)

    def _sum(self, rows_NK: Tensor) -> None:
        for total, columns in zip(self._sums, self._columns, strict=True):
            block_NK = rows_NK[:, columns]
            total += block_NK.T @ block_NK


def _slack(diagonal_K: Tensor, damping: float | None, share: float) -> float:
    return 0.1 * float(diagonal_K.mean()) if damping is None else share * damping
