"""Second moments of example rows, block by block, and the whitening that they give."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from trainer_attrib.numerics.repeated_rows import RepeatedRows


class SecondMoments:
    """Running sums of r r^T over rows r, one block of columns at a time, in float64; and of r and |r|^4, which tell
    what rows share and how well the means are known.

    Args:
        spans: the columns of each block; blocks are taken to be uncorrelated (Chang et al. 2024, "TrackStar", A.1.2).
    """

    def __init__(self, spans: Sequence[slice]) -> None:
        self.spans, self.rows = list(spans), 0
        self.sums = [torch.zeros(s.stop - s.start, s.stop - s.start, dtype=torch.float64) for s in spans]
        self._totals = [torch.zeros(s.stop - s.start, dtype=torch.float64) for s in spans]
        self._fourth = torch.zeros(len(self.spans), dtype=torch.float64)
        self._repeated = RepeatedRows(self.spans)

    def add(self, rows_NK: Tensor, examples: Sequence[str] | None = None) -> None:
        """Take in rows, with their norms, and what they are of, [N]; None: each of an example of its own."""
        self.rows += len(rows_NK)
        if examples is not None:
            self._repeated.add(examples, rows_NK)
        for number, (total_KK, span) in enumerate(zip(self.sums, self.spans, strict=True)):
            block_NK = rows_NK[:, span].float()
            total_KK += (block_NK.T @ block_NK).double()
            self._totals[number] += block_NK.double().sum(0)
            self._fourth[number] += block_NK.double().square().sum(1).square().sum()

    def merge(self, other: SecondMoments) -> None:
        """Take in the rows that another has taken in."""
        self.rows += other.rows
        self._fourth += other._fourth
        self._repeated.merge(other._repeated)
        for mine, theirs in ((self.sums, other.sums), (self._totals, other._totals)):
            for own, added in zip(mine, theirs, strict=True):
                own += added

    def means(self) -> list[Tensor]:
        """Mean outer product of each block, [K, K] float64."""
        return [total_KK / max(1, self.rows) for total_KK in self.sums]

    def shared(self) -> list[Tensor]:
        """What different rows have in common: mean of r_i r_j^T over all pairs of different rows, its negative part,
        which is noise, left out, [K, K]. A row's product with itself is not among them: what is its own stays out, so
        that a few rows tell as much about it as many, but for noise. Zero of a single row."""
        pairs = max(1, self.rows * (self.rows - 1))
        found = []
        for total_K, total_KK in zip(self._totals, self.sums, strict=True):
            values_K, vectors_KK = torch.linalg.eigh((torch.outer(total_K, total_K) - total_KK) / pairs)
            found.append((vectors_KK * values_K.clamp_min(0)) @ vectors_KK.T)
        return found if self.rows > 1 else [torch.zeros_like(total_KK) for total_KK in self.sums]

    def noise(self) -> list[float]:
        """Which share of each mean's departure from a multiple of the identity is noise, from 0 (known exactly) to 1
        (nothing is known): that by which it is to be shrunk towards the identity for the smallest expected squared
        error (Ledoit & Wolf 2004, "A well-conditioned estimator for large-dimensional covariance matrices", equation
        14, for a known mean of 0). It is told by all rows, since the first ones of a training are unlike the others;
        rows of one example count as so many as they differ."""
        means = self.means()
        return [
            _noise(m, float(fourth) / max(1, self.rows), self.rows / effect)
            for m, fourth, effect in zip(means, self._fourth, self._repeated.effects(means), strict=True)
        ]


def _noise(moment_KK: Tensor, fourth: float, rows: float) -> float:
    departure = float((moment_KK - shrunk(moment_KK, 1.0)).square().sum())
    if rows <= 1 or departure <= 0:
        return 1.0
    error = (fourth - float(moment_KK.square().sum())) / (rows - 1)  # squared standard error of the mean
    return min(1.0, max(0.0, error / departure))


def mixing_weight(task: Iterable[Tensor], train: Iterable[Tensor], place: int) -> float:
    """Weight of the task's second moments in their mix with the training set's, so that the two sorted spectra cross at
    a place: task[k] * weight = train[k] * (1 - weight) (Chang et al. 2024, "TrackStar", A.1.3, which takes k of about
    1/64 of the components).

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


def shrunk(moment_KK: Tensor, share: float) -> Tensor:
    """A second moment of which a share is replaced by its mean eigenvalue times the identity, [K, K] float64."""
    moment_KK = moment_KK.double()
    return (1 - share) * moment_KK + share * moment_KK.diagonal().mean() * torch.eye(
        len(moment_KK), dtype=torch.float64
    )


def inverse_root(moment_KK: Tensor) -> Tensor:
    """R^(-1/2) of a positive semi-definite R, zero where R is: float32 [K, K]."""
    values_K, vectors_KK = torch.linalg.eigh(moment_KK.double())
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
