"""From scores of rows to scores of examples: the visits of each are summed within a part, then over the parts.

In this order everywhere: the sums are the same bits whichever process scored a part, and whatever is kept of them.
"""

from __future__ import annotations

from dataclasses import dataclass, field

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
    """

    ids: list[str]
    last_steps: np.ndarray
    scores: np.ndarray
    places: np.ndarray | None = None


@dataclass(frozen=True)
class PartVisits:
    """The examples of one part in the order of their first row in it.

    Args:
        ids: [N].
        counts: rows of each, [N].
        last_steps: of each, [N].
    """

    ids: pa.StringArray
    counts: np.ndarray
    last_steps: np.ndarray


def named(ids: pa.Array, places: np.ndarray) -> np.ndarray:
    """Some ids, as strings that numpy sorts."""
    return np.array(ids.take(pa.array(places)).to_pylist(), dtype=str)


def part_visits(table: pa.Table) -> tuple[PartVisits, np.ndarray]:
    """The examples of some rows, and which of them each row is of, [rows]."""
    encoded = table["example"].combine_chunks().dictionary_encode()
    ids, at = encoded.dictionary, encoded.indices.to_numpy(zero_copy_only=False)
    counts, last_steps = np.bincount(at, minlength=len(ids)), np.zeros(len(ids), np.int64)
    np.maximum.at(last_steps, at, table["step"].to_numpy())
    return PartVisits(ids, counts, last_steps), at


def part_sums(at: np.ndarray, examples: int, scores_QN: np.ndarray) -> np.ndarray:
    """Sums of the scores of the rows of each example, float64 [Q, examples], in the order of the rows."""
    if len(at) == examples:  # one row each, in their order
        return scores_QN.astype(np.float64)
    order = np.argsort(at, kind="stable")
    starts = np.searchsorted(at[order], np.arange(examples))
    return np.add.reduceat(scores_QN[:, order], starts, axis=1, dtype=np.float64)


@dataclass
class Visits:
    """Examples by number, how often each was visited, and when for the last time."""

    index: dict[str, int] = field(default_factory=dict)
    counts: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    last_steps: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))

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
    """The values with zeros after them. Room is doubled, so that adding many parts takes linear time."""
    if length <= len(values):
        return values
    base = values.base if isinstance(values.base, np.ndarray) else values
    if length > len(base):
        base = np.zeros((max(length, 2 * len(values)), *values.shape[1:]), values.dtype)
        base[: len(values)] = values
    return base[:length]


class AllScores:
    """Every score of every example: [Q, N] numbers are held.

    Args:
        queries: Q.
        sums: an example's score is the sum over its visits, not their mean.
    """

    def __init__(self, queries: int, *, sums: bool) -> None:
        self._sums, self._visits = sums, Visits()
        self._scores_NQ = np.zeros((0, queries))

    def add(self, part: PartVisits, sums_QN: np.ndarray) -> None:
        """Take in the examples of one part and the sums of their rows' scores."""
        numbers_N = self._visits.add(part)
        self._scores_NQ = grown(self._scores_NQ, len(self._visits.index))
        self._scores_NQ[numbers_N] += sums_QN.T

    def found(self) -> Found:
        """The scores of all examples."""
        scores = means(self._scores_NQ.T, self._visits.counts, sums=self._sums)
        return Found(list(self._visits.index), self._visits.last_steps, scores)
