"""The examples of a stage while rows stream by: their numbers, and the sums over their visits in training."""

from __future__ import annotations

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
    """

    ids: list[str]
    last_steps: np.ndarray
    scores: np.ndarray
    places: np.ndarray | None = None


class Collector(Protocol):
    """Puts the scores of rows together to scores of examples."""

    def add(self, table: pa.Table, scores_QN: np.ndarray) -> None:
        """Take in rows of one part, [N] in the table, and their scores."""
        ...


@dataclass
class Visits:
    """Examples by number, how often each was visited, and when for the last time."""

    index: dict[str, int] = field(default_factory=dict)
    counts: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    last_steps: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))

    def add(self, table: pa.Table) -> np.ndarray:
        """Count the visits of some rows; returns the number of each row's example."""
        numbers_N = self.numbers(table)
        grow = len(self.index) - len(self.counts)
        self.counts, self.last_steps = np.pad(self.counts, (0, grow)), np.pad(self.last_steps, (0, grow))
        np.add.at(self.counts, numbers_N, 1)
        np.maximum.at(self.last_steps, numbers_N, table["step"].to_numpy())
        return numbers_N

    def numbers(self, table: pa.Table) -> np.ndarray:
        """The number of each row's example; new ones are given the next."""
        index = self.index
        return np.array([index.setdefault(example, len(index)) for example in table["example"].to_pylist()], np.int64)


class AllScores:
    """Every score of every example: [Q, N] numbers are held.

    Args:
        queries: Q.
        sums: an example's score is the sum over its visits, not their mean.
    """

    def __init__(self, queries: int, sums: bool) -> None:
        self._sums, self._visits = sums, Visits()
        self._scores_NQ = np.zeros((0, queries))

    def add(self, table: pa.Table, scores_QN: np.ndarray) -> None:
        """See :meth:`Collector.add`."""
        numbers_N = self._visits.add(table)
        known, now = len(self._scores_NQ), len(self._visits.index)
        if now > known:
            self._scores_NQ = np.concatenate([self._scores_NQ, np.zeros((now - known, self._scores_NQ.shape[1]))])
        add_rows(self._scores_NQ, numbers_N, scores_QN)

    def found(self) -> Found:
        """The scores of all examples."""
        shares_N = np.ones(len(self._visits.counts)) if self._sums else self._visits.counts
        scores = (self._scores_NQ / shares_N[:, None]).T.astype(np.float32)
        return Found(list(self._visits.index), self._visits.last_steps, scores)


def add_rows(totals_NQ: np.ndarray, at_N: np.ndarray, scores_QN: np.ndarray) -> None:
    """Add scores to the totals at these places, in the order of the rows where a place is there twice."""
    if len(np.unique(at_N)) == len(at_N):
        totals_NQ[at_N] += scores_QN.T
    else:
        np.add.at(totals_NQ, at_N, scores_QN.T)
