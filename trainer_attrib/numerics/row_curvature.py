"""Second moments of example rows, block by block, and the whitening that they give."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


class SecondMoments:
    """Running sums of r r^T over rows r, one block of columns at a time, in float64.

    Args:
        spans: the columns of each block; blocks are taken to be uncorrelated (Chang et al. 2024, "TrackStar", A.1.2).
    """

    def __init__(self, spans: Sequence[slice]) -> None:
        self.spans, self.rows = list(spans), 0
        self.sums = [torch.zeros(s.stop - s.start, s.stop - s.start, dtype=torch.float64) for s in spans]

    def add(self, rows_NK: Tensor) -> None:
        """Take in rows, with their norms."""
        self.rows += len(rows_NK)
        for total_KK, span in zip(self.sums, self.spans, strict=True):
            block_NK = rows_NK[:, span].float()
            total_KK += (block_NK.T @ block_NK).double()

    def means(self) -> list[Tensor]:
        """Mean outer product of each block, [K, K] float64."""
        return [total_KK / max(1, self.rows) for total_KK in self.sums]


def mixing_weight(task: Iterable[Tensor], train: Iterable[Tensor], place: int) -> float:
    """Weight of the task's second moments in their mix with the training set's, so that the two sorted spectra cross at
    a place: task[k] * weight = train[k] * (1 - weight) (Chang et al. 2024, "TrackStar", A.1.3, which takes k of about
    1/64 of the components). What is common to the task's queries, the template above all, then counts for less,
    and only there.

    Args:
        task: second moments of the task's queries, blocks [K, K].
        train: those of training rows.
        place: k, counted from 0 over all blocks together.

    Returns:
        between 0 and 1; 0 where the task has nothing at that place.
    """
    at_task, at_train = (_sorted_values(blocks)[place] for blocks in (task, train))
    total = float(at_task + at_train)
    return float(at_train) / total if total > 0 and float(at_task) > 0 else 0.0


def _sorted_values(blocks: Iterable[Tensor]) -> Tensor:
    return torch.cat([torch.linalg.eigvalsh(block_KK) for block_KK in blocks]).clamp_min(0).sort(descending=True).values


def shrinkage(rows_NK: Tensor, moment_KK: Tensor) -> float:
    """How much of a second moment to replace by a multiple of the identity, chosen on the rows that it is the mean of:
    the share that minimises the expected squared distance to the true one (Ledoit & Wolf 2004, "A well-conditioned
    estimator for large-dimensional covariance matrices", equation 14, for a known mean of 0).

    Args:
        rows_NK: the rows, or a sample of them.
        moment_KK: mean of their outer products.

    Returns:
        between 0 and 1.
    """
    rows_NK, size = rows_NK.double(), len(moment_KK)
    mean = moment_KK.diagonal().mean()
    spread = ((moment_KK - mean * torch.eye(size, dtype=moment_KK.dtype)) ** 2).sum() / size
    fourth = (rows_NK.square().sum(1) ** 2).mean()  # E |r r^T|^2
    noise = (fourth - (moment_KK**2).sum()) / size / max(1, len(rows_NK))
    return float((noise / spread).clamp(0, 1)) if float(spread) > 0 else 1.0


def inverse_root(moment_KK: Tensor, share: float) -> Tensor:
    """(R + shrinkage towards the identity)^(-1/2), float32 [K, K].

    Args:
        moment_KK: R, positive semi-definite.
        share: of R that is replaced by the mean of its eigenvalues times the identity.
    """
    values_K, vectors_KK = torch.linalg.eigh(moment_KK.double())
    values_K = (1 - share) * values_K.clamp_min(0) + share * values_K.clamp_min(0).mean()
    floor = 1e-12 * float(values_K.max())
    root_K = torch.where(values_K > floor, values_K.clamp_min(1e-300).rsqrt(), 0.0)
    return ((vectors_KK * root_K) @ vectors_KK.T).float()


def damped_inverse(moment_KK: Tensor, damping: float) -> Tensor:
    """(R + damping * mean eigenvalue)^(-1), float32 [K, K]; zeros where R is zero."""
    slack = damping * float(moment_KK.diagonal().mean())
    if slack <= 0:
        return torch.zeros_like(moment_KK).float()
    return torch.linalg.inv(moment_KK.double() + slack * torch.eye(len(moment_KK), dtype=torch.float64)).float()


def whiten(rows_NK: Tensor, spans: Sequence[slice], roots: Sequence[Tensor]) -> Tensor:
    """Rows with each block multiplied by its matrix, [N, K]."""
    found_NK = torch.zeros_like(rows_NK)
    for span, root_KK in zip(spans, roots, strict=True):
        found_NK[:, span] = rows_NK[:, span] @ root_KK
    return found_NK
