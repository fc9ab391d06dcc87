"""From scores of rows to scores of examples: the visits of each are summed within a part, then over the parts.

In this order everywhere: the sums are the same bits whichever process scored a part, and whatever is kept of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import pyarrow as pa


@dataclass(frozen=True)
class Found:
    """What was collected, M scores per query.

    Args:
        ids: of the examples, in the order of their first visit, [N].
        last_steps: last step in which each took part, [N].
        scores: float32 [Q, M].
        places: which example each score is of; None: all of them, in order, [Q, M].
        told: what the ledger tells of the examples, in their order; None: it was not read.
    """

    ids: list[str]
    last_steps: np.ndarray
    scores: np.ndarray
    places: np.ndarray | None = None
    told: pa.Table | None = None


@dataclass(frozen=True)
class PartVisits:
    """The examples of one part in the order of their first row in it.

    Args:
        ids: [N].
        counts: rows of each, int32 [N].
        last_steps: of each, int32 [N].
        told: what the ledger tells of each, in this order; None: it was not read.
    """

    ids: pa.StringArray
    counts: np.ndarray
    last_steps: np.ndarray
    told: pa.Table | None = None


def named(ids: pa.Array, places: np.ndarray) -> np.ndarray:
    """Some ids, as strings that numpy sorts."""
    return np.array(ids.take(pa.array(places)).to_pylist(), dtype=str)


def numbered(ids: Sequence[pa.Array]) -> tuple[pa.LargeStringArray, np.ndarray]:
    """Different ids in the order in which they first appear, and which of them each is, int32 [N]."""
    parts = [part.cast(pa.large_string()) for part in ids]  # strings of 32 bits end at 2 GB of them
    coded = pa.chunked_array(parts, pa.large_string()).dictionary_encode()
    if not coded.num_chunks:
        return pa.array([], pa.large_string()), np.zeros(0, np.int32)
    at = [chunk.indices.to_numpy(zero_copy_only=False) for chunk in coded.chunks]
    return coded.chunk(0).dictionary, np.concatenate(at)


def part_visits(table: pa.Table) -> tuple[PartVisits, np.ndarray]:
    """The examples of some rows, and which of them each row is of, [rows]."""
    encoded = table["example"].combine_chunks().dictionary_encode()
    ids, at = encoded.dictionary, encoded.indices.to_numpy(zero_copy_only=False)
    counts, last_steps = np.bincount(at, minlength=len(ids)).astype(np.int32), np.zeros(len(ids), np.int32)
    np.maximum.at(last_steps, at, table["step"].to_numpy().astype(np.int32))
    return PartVisits(ids, counts, last_steps), at


def single_visits(table: pa.Table) -> tuple[PartVisits, np.ndarray]:
    """:func:`part_visits` of rows that are known to be of different examples: no ids are compared."""
    steps = table["step"].to_numpy().astype(np.int32)
    return PartVisits(table["example"].combine_chunks(), np.ones_like(steps), steps), np.arange(len(steps))


def part_sums(at: np.ndarray, examples: int, scores_QN: np.ndarray) -> np.ndarray:
    """Sums of the scores of the rows of each example, [Q, examples], in the order of the rows: float64, or where there
    is one row each what they were."""
    if len(at) == examples:  # in their order
        return scores_QN
    order = np.argsort(at, kind="stable")
    starts = np.searchsorted(at[order], np.arange(examples))
    return np.add.reduceat(scores_QN[:, order], starts, axis=1, dtype=np.float64)


@dataclass
class Visits:
    """Examples by number, how often each was visited, and when for the last time."""

    index: dict[str, int] = field(default_factory=dict)
    counts: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))
    last_steps: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))

    def add(self, part: PartVisits) -> np.ndarray:
        """Count the visits of a part; returns the number of each of its examples. New ones are given the next."""
        index = self.index
        numbers_N = np.array([index.setdefault(example, len(index)) for example in part.ids.to_pylist()], np.int64)
        self.counts, self.last_steps = grown(self.counts, len(index)), grown(self.last_steps, len(index))
        self.counts[numbers_N] += part.counts
        self.last_steps[numbers_N] = np.maximum(self.last_steps[numbers_N], part.last_steps)
        return numbers_N


def means(sums_QN: np.ndarray, counts_N: np.ndarray, *, sums: bool) -> np.ndarray:
    """Scores of examples all of whose visits are summed: their mean, or their sum, float32 [Q, N]."""
    once = sums or bool((counts_N == 1).all())
    return np.ascontiguousarray(sums_QN if once else sums_QN / counts_N, np.float32)


def grown(values: np.ndarray, length: int) -> np.ndarray:
    """The values [..., N] with zeros after them. Room is doubled, so that adding many parts takes linear time."""
    held = values.shape[-1]
    if length <= held:
        return values
    base = values.base if isinstance(values.base, np.ndarray) else values
    if length > base.shape[-1]:
        base = np.zeros((*values.shape[:-1], max(length, 2 * held)), values.dtype)
        base[..., :held] = values
    return base[..., :length]


class Scores(Protocol):
    """Every score of every example: [Q, N] numbers are held."""

    def add(self, part: PartVisits, sums_QN: np.ndarray) -> None:
        """Take in the examples of one part and the sums of their rows' scores."""
        ...

    def found(self) -> Found:
        """The scores of all examples."""
        ...


class SingleScores:
    """:class:`Scores` where no example is in two parts: they are put side by side.

    Args:
        queries: Q.
    """

    def __init__(self, queries: int) -> None:
        self._parts, self._scores = list[PartVisits](), [np.zeros((queries, 0), np.float32)]

    def add(self, part: PartVisits, sums_QN: np.ndarray) -> None:
        """See :class:`Scores`."""
        self._parts.append(part)
        self._scores.append(sums_QN)

    def found(self) -> Found:
        """See :class:`Scores`."""
        ids = [example for part in self._parts for example in part.ids.to_numpy(zero_copy_only=False)]
        last_steps = np.concatenate([np.zeros(0, np.int32), *(part.last_steps for part in self._parts)])
        told = [part.told for part in self._parts if part.told is not None]
        whole = pa.concat_tables(told) if told and len(told) == len(self._parts) else None
        return Found(ids, last_steps, np.concatenate(self._scores, axis=1), told=whole)


class AllScores:
    """:class:`Scores` where an example may be in several parts.

    Args:
        queries: Q.
        sums: an example's score is the sum over its visits, not their mean.
    """

    def __init__(self, queries: int, *, sums: bool) -> None:
        self._sums, self._visits = sums, Visits()
        self._scores_QN = np.zeros((queries, 0))

    def add(self, part: PartVisits, sums_QN: np.ndarray) -> None:
        """See :class:`Scores`."""
        numbers_N = self._visits.add(part)
        self._scores_QN = grown(self._scores_QN, len(self._visits.index))
        in_order = len(numbers_N) and bool((np.diff(numbers_N) == 1).all())  # a slice is added to many times faster
        self._scores_QN[:, slice(numbers_N[0], numbers_N[-1] + 1) if in_order else numbers_N] += sums_QN

    def found(self) -> Found:
        """See :class:`Scores`."""
        scores = means(self._scores_QN, self._visits.counts, sums=self._sums)
        return Found(list(self._visits.index), self._visits.last_steps, scores)
