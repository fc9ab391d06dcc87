"""Curvature fitted to rows whose outer products add up to it, and its response to a force, block by block."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from trainer_attrib.numerics.spectral import proximal_response

WHOLE = 1 << 27  # bytes that blocks may take before only their diagonals are kept


class CurvatureFit:
    """One matrix per block of columns. Blocks are whole where they fit into memory; else their diagonals are kept,
    which is all where the coordinates are the curvature's eigenvectors (George et al. 2018, "EK-FAC").

    Args:
        spans: the columns of each block.
        like: a tensor with the rows' dtype and device.
    """

    def __init__(self, spans: Sequence[slice], like: Tensor) -> None:
        self.spans, sizes = list(spans), [span.stop - span.start for span in spans]
        self.whole = sum(size**2 for size in sizes) * like.element_size() <= WHOLE
        self._sums = [like.new_zeros(size, size) if self.whole else like.new_zeros(size) for size in sizes]

    def add(self, rows_NK: Tensor) -> None:
        """Take in rows."""
        for total, span in zip(self._sums, self.spans, strict=True):
            block_NK = rows_NK[:, span]
            total += block_NK.T @ block_NK if self.whole else block_NK.square().sum(0)

    def respond(self, forces_QK: Tensor, count: int, decay: float) -> Tensor:
        """The proximal response to forces, [Q, K].

        Args:
            forces_QK: in the rows' coordinates.
            count: curvature is the sum of the rows' outer products over this.
            decay: see :func:`~trainer_attrib.numerics.spectral.proximal_response`.
        """
        found_QK = torch.zeros_like(forces_QK)
        for total, span in zip(self._sums, self.spans, strict=True):
            if self.whole:
                values_K, vectors_KK = torch.linalg.eigh(total / count)
                turned_QK = (forces_QK[:, span] @ vectors_KK) * proximal_response(values_K, decay)
                found_QK[:, span] = turned_QK @ vectors_KK.T
            else:
                found_QK[:, span] = forces_QK[:, span] * proximal_response(total / count, decay)
        return found_QK
