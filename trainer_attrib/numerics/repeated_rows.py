"""How many times over the rows of one example say the same: an example's rows of several epochs are alike."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence
from functools import cache
from heapq import nsmallest

import torch
from torch import Tensor

EXAMPLES = 256  # of which the rows are looked at
PROBES = 8


class RepeatedRows:
    """Sums over the rows of a sample of examples, the same sample in whatever order and split rows come.

    Of r r^T of each row r one sees a^T r r^T b for a few pairs of random vectors. The mean square of a^T A b over
    Gaussian a and b is |A|^2, so sums over an example's rows tell the size of sums of their r r^T.

    Args:
        spans: the columns of each block.
    """

    def __init__(self, spans: Sequence[slice]) -> None:
        self.spans = list(spans)
        self._place: dict[str, int] = {}  # of an example among the sums
        self._sums = self._nothing(0)

    def add(self, examples: Sequence[str], rows_NK: Tensor) -> None:
        """Take in rows and what they are of, [N]."""
        self._sample(examples)
        at = [number for number, name in enumerate(examples) if name in self._place]
        seen_NBP = torch.stack([_probed(rows_NK[at, span].float()) for span in self.spans], 1).double()
        told_N3BP = torch.stack([torch.ones_like(seen_NBP), seen_NBP, seen_NBP.square()], 1)
        self._sums.index_add_(0, self._places(examples[number] for number in at), told_N3BP)

    def merge(self, other: RepeatedRows) -> None:
        """Take in the rows that another has taken in."""
        self._sample(other._place)
        both = [name for name in other._place if name in self._place]
        self._sums.index_add_(0, self._places(both), other._sums[other._places(both)])

    def _sample(self, more: Iterable[str]) -> None:
        """Keep those of the smallest hashes: who is left out of some is left out of more."""
        names = self._place.keys() | set(more)
        if len(names) > EXAMPLES:
            names = set(nsmallest(EXAMPLES, names, key=lambda name: (zlib.crc32(name.encode()), name)))
        if names != self._place.keys():
            kept = [name for name in self._place if name in names]
            held = self._sums[self._places(kept)]
            self._place = {name: place for place, name in enumerate([*kept, *sorted(names - set(kept))])}
            self._sums = torch.cat([held, self._nothing(len(names) - len(kept))])

    def _places(self, names: Iterable[str]) -> Tensor:
        return torch.tensor([self._place[name] for name in names], dtype=torch.int64)

    def _nothing(self, examples: int) -> Tensor:
        """[examples, 3, B, probes]: counts, sums, sums of squares."""
        return torch.zeros(examples, 3, len(self.spans), PROBES, dtype=torch.float64)

    def effects(self, means: Sequence[Tensor]) -> list[float]:
        """Of each block, how many times larger the squared error of the mean of r r^T is than if every row were of an
        example of its own (the "design effect" of Kish 1965, "Survey sampling"), 1 at least: 1 where each example has
        one row, the number of its rows where they are all equal.

        Args:
            means: of r r^T over all rows, blocks [K, K].
        """
        rows_EBP, sums_EBP, squares_EBP = self._sums.unbind(1)
        mean_BP = torch.stack([_expected(mean_KK) for mean_KK in means])
        together_B = (sums_EBP - rows_EBP * mean_BP).square().sum((0, 2))
        apart_B = (squares_EBP - 2 * mean_BP * sums_EBP + rows_EBP * mean_BP.square()).sum((0, 2))
        return [max(1.0, float(t / a)) if a > 0 else 1.0 for t, a in zip(together_B, apart_B, strict=True)]


def _probed(rows_NK: Tensor) -> Tensor:
    """a^T r r^T b of each row for every pair of random vectors, [N, probes]."""
    a_PK, b_PK = _probes(rows_NK.shape[1])
    return (rows_NK @ a_PK.T) * (rows_NK @ b_PK.T)


def _expected(mean_KK: Tensor) -> Tensor:
    """The mean over rows of what is seen of them, [probes]."""
    a_PK, b_PK = (probe_PK.double() for probe_PK in _probes(len(mean_KK)))
    return ((a_PK @ mean_KK) * b_PK).sum(1)


@cache
def _probes(size: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(size)
    a_PK, b_PK = torch.randn(2, PROBES, size, generator=generator)
    return a_PK, b_PK
