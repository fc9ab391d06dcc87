"""Both ends of every ranking in one stream, without holding a score of every example."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from trainer_attrib.analysis.retrieval.visits import Found, Visits, add_rows
from trainer_attrib.numerics.scores import rank

BUDGET = 1 << 30  # bytes of running sums


class Plan:
    """What is known of a stage's visits before its sketches are read: when each example's last visit has been.

    Of the scores only the sums of *open* examples are held, which have been visited and will be again. In a stage of
    one epoch none are; over several epochs all may be, and then the queries are split so that their sums fit a budget,
    one stream over the rows for each group of them.
    """

    def __init__(self) -> None:
        self.visits, self.numbers, self._blocks = Visits(), list[np.ndarray](), 0
        self._first, self._last = np.zeros(0, np.int64), np.zeros(0, np.int64)

    def add(self, table: pa.Table) -> None:
        """Count a part's rows, in the order in which parts will be scored."""
        numbers_N = self.visits.add(table)
        self.numbers.append(numbers_N)
        grow = len(self.visits.index) - len(self._first)
        self._first = np.pad(self._first, (0, grow), constant_values=self._blocks)
        self._last = np.pad(self._last, (0, grow))
        self._last[numbers_N] = self._blocks
        self._blocks += 1

    @property
    def open(self) -> int:
        """The largest number of examples whose sums have to be held at once."""
        if not self._blocks:
            return 0
        begun = np.bincount(self._first, minlength=self._blocks).cumsum()
        ended = np.bincount(self._last, minlength=self._blocks).cumsum()
        return int((begun - np.concatenate([[0], ended[:-1]])).max())

    def groups(self, queries: int, budget: int = BUDGET) -> list[slice]:
        """The queries in groups whose float64 sums fit into so many bytes, at least one query each."""
        size = max(1, min(queries, budget // (8 * max(1, self.open))))
        return [slice(at, min(at + size, queries)) for at in range(0, queries, size)]


class Ends:
    """The k largest and the k smallest scores of every query; equal scores by id, the smallest ids being kept.

    The sums over an example's visits are made as :class:`AllScores` makes them, so the scores are the same bits.

    Args:
        plan: of all rows that will come.
        queries: Q.
        keep: k.
        sums: an example's score is the sum over its visits, not their mean.
    """

    def __init__(self, plan: Plan, queries: int, keep: int, sums: bool) -> None:
        self._visits, self._numbers, self._sums = plan.visits, iter(plan.numbers), sums
        self._ids = np.array(list(plan.visits.index), dtype=object)
        self._left = plan.visits.counts.copy()
        self._slots = np.full(len(self._left), -1, np.int64)
        self._free = list(range(plan.open))[::-1]
        self._open_SQ = np.zeros((plan.open, queries))
        self._held = [[_End(self._ids, keep, largest) for largest in (True, False)] for _ in range(queries)]

    def add(self, table: pa.Table, scores_QN: np.ndarray) -> None:
        """See :meth:`Collector.add`."""
        numbers_N = next(self._numbers)
        here, visits = np.unique(numbers_N, return_counts=True)
        new = here[self._slots[here] < 0]
        self._slots[new] = [self._free.pop() for _ in range(len(new))]
        add_rows(self._open_SQ, self._slots[numbers_N], scores_QN)
        self._left[here] -= visits
        self._close(here[self._left[here] == 0])

    def found(self) -> Found:
        """The scores at both ends; NaN where there are fewer than 2k."""
        kept = [_together(top, bottom) for top, bottom in self._held]
        width = max((len(numbers) for _, numbers in kept), default=0)
        scores = np.full((len(kept), width), np.nan, np.float32)
        numbers_QM = np.zeros((len(kept), width), np.int64)
        for query, (found, numbers) in enumerate(kept):
            scores[query, : len(found)], numbers_QM[query, : len(found)] = found, numbers
        named = np.unique(np.concatenate([np.zeros(0, np.int64), *(numbers for _, numbers in kept)]))
        places = np.where(np.isnan(scores), 0, np.searchsorted(named, numbers_QM))
        return Found(list(self._ids[named]), self._visits.last_steps[named], scores, places)

    def _close(self, numbers_F: np.ndarray) -> None:
        """Offer the final scores of examples that will not be visited again, and forget them."""
        slots = self._slots[numbers_F]
        shares_F = np.ones(len(numbers_F)) if self._sums else self._visits.counts[numbers_F]
        scores_QF = np.ascontiguousarray((self._open_SQ[slots] / shares_F[:, None]).T, np.float32)
        for ends, scores_F in zip(self._held, scores_QF, strict=True):
            for end in ends:
                end.offer(scores_F, numbers_F)
        self._open_SQ[slots] = 0
        self._free.extend(slots.tolist())


class _End:
    """One end of one query's ranking."""

    def __init__(self, ids: np.ndarray, keep: int, largest: bool) -> None:
        self._ids, self._keep, self._largest = ids, keep, largest
        self.scores, self.numbers = np.zeros(0, np.float32), np.zeros(0, np.int64)
        self._bar = np.float32(-np.inf if largest else np.inf)  # of the scores when k are held

    def offer(self, scores_F: np.ndarray, numbers_F: np.ndarray) -> None:
        better = scores_F >= self._bar if self._largest else scores_F <= self._bar  # a NaN is neither
        if not better.any():
            return
        self.scores = np.concatenate([self.scores, scores_F[better]])
        self.numbers = np.concatenate([self.numbers, numbers_F[better]])
        if len(self.scores) > self._keep:
            kept = self._best()
            self.scores, self.numbers = self.scores[kept], self.numbers[kept]
        if len(self.scores) == self._keep:
            self._bar = self.scores.min() if self._largest else self.scores.max()

    def _best(self) -> np.ndarray:
        """Sorting by id is slow, so only what ties at the bar is sorted."""
        keys = -self.scores if self._largest else self.scores
        bar = np.partition(keys, self._keep - 1)[self._keep - 1]
        sure, tied = np.flatnonzero(keys < bar), np.flatnonzero(keys == bar)
        if len(sure) + len(tied) > self._keep:
            ids = self._ids[self.numbers[tied]].astype(str)
            tied = tied[rank(self.scores[tied], ids, self._keep - len(sure), largest=self._largest)]
        return np.concatenate([sure, tied])


def _together(top: _End, bottom: _End) -> tuple[np.ndarray, np.ndarray]:
    """Scores and numbers of both ends, each example once."""
    numbers, first = np.unique(np.concatenate([top.numbers, bottom.numbers]), return_index=True)
    return np.concatenate([top.scores, bottom.scores])[first], numbers


def ends_of(scores_QN: np.ndarray, ids_N: np.ndarray, keep: int) -> tuple[np.ndarray, np.ndarray]:
    """Both ends of scores that are there already: scores and places, both [Q, M], NaN where there are fewer."""
    ids = ids_N.astype(str)
    kept = [
        np.unique(np.concatenate([rank(scores_N, ids, keep, largest=largest) for largest in (True, False)]))
        for scores_N in scores_QN
    ]
    width = max((len(places) for places in kept), default=0)
    scores, places = np.full((len(kept), width), np.nan, np.float32), np.zeros((len(kept), width), np.int64)
    for query, found in enumerate(kept):
        scores[query, : len(found)], places[query, : len(found)] = scores_QN[query, found], found
    return scores, places


def together(groups: Sequence[Found]) -> Found:
    """What was found for groups of queries, one after the other, over the same rows."""
    steps = {i: int(step) for found in groups for i, step in zip(found.ids, found.last_steps, strict=True)}
    place = {example: number for number, example in enumerate(steps)}
    width = max(found.scores.shape[1] for found in groups)
    scores, places = [], []
    for found in groups:
        short = ((0, 0), (0, width - found.scores.shape[1]))
        here = np.array([place[example] for example in found.ids] or [0], np.int64)
        scores.append(np.pad(found.scores, short, constant_values=np.nan))
        places.append(
            here[np.pad(np.zeros_like(found.scores, np.int64) if found.places is None else found.places, short)]
        )
    last_steps = np.array(list(steps.values()), np.int64)
    return Found(list(steps), last_steps, np.concatenate(scores), np.concatenate(places))
