"""Which examples are in several parts of a stage, known before its sketches are read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from trainer_attrib.analysis.retrieval.visits import PartVisits

BUDGET = 1 << 30  # bytes of running sums


@dataclass(frozen=True)
class Plan:
    """The O examples that are in several parts.

    An example that is in one part only is *closed* there: its score is known when that part is scored. Of others sums
    are held while they are *open*, between their first part and their last. In a stage of one epoch none are; over
    several epochs all may be, and then the queries are split so that their sums fit a budget, one stream over the rows
    for each group of them.

    Args:
        counts: rows of each, [O].
        last_steps: in which each took part, [O].
        first: part of each, [O].
        last: part of each, [O].
        places: which of the examples of each part they are, [M] of a part; empty if O is 0.
        numbers: which of the O they are, [M] of a part; empty if O is 0.
    """

    counts: np.ndarray
    last_steps: np.ndarray
    first: np.ndarray
    last: np.ndarray
    places: Sequence[np.ndarray] = ()
    numbers: Sequence[np.ndarray] = ()

    @staticmethod
    def nothing_open() -> Plan:
        """Of a stage that is known to have every example in one part only, however many those are."""
        none = np.zeros(0, np.int32)
        return Plan(none, none, none, none)

    @staticmethod
    def of(parts: Sequence[PartVisits], numbers: Sequence[np.ndarray]) -> Plan:
        """Of all parts, in the order in which they will be scored.

        Args:
            parts: their visits.
            numbers: of the examples of each part, from 0 in the order of their first rows.
        """
        count = 1 + max((int(at.max()) for at in numbers if len(at)), default=-1)
        counts, last_steps, first, last = (np.zeros(count, np.int32) for _ in range(4))
        for block, (part, at) in reversed(list(enumerate(zip(parts, numbers, strict=True)))):
            counts[at] += part.counts
            last_steps[at] = np.maximum(last_steps[at], part.last_steps)
            last[at] = np.maximum(last[at], block)
            first[at] = block
        several = first != last
        if not several.any():
            return Plan.nothing_open()
        places = [np.flatnonzero(several[at]) for at in numbers]
        renumbered = np.cumsum(several, dtype=np.int32) - 1
        open_ones = [renumbered[at[place]] for at, place in zip(numbers, places, strict=True)]
        return Plan(counts[several], last_steps[several], first[several], last[several], places, open_ones)

    def open_in(self, part: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of the examples of one part that are in others too: which they are of the part's, which of all O, and whether
        they are in no later part, each [M]."""
        if not self.numbers:
            none = np.zeros(0, np.int32)
            return none, none, none.astype(bool)
        numbers_M = self.numbers[part]
        return self.places[part], numbers_M, self.last[numbers_M] == part

    @property
    def open(self) -> int:
        """The largest number of examples that are open at once."""
        if not len(self.first):
            return 0
        begun = np.bincount(self.first, minlength=len(self.numbers)).cumsum()
        ended = np.bincount(self.last, minlength=len(self.numbers)).cumsum()
        return int((begun - np.concatenate([[0], ended[:-1]])).max())

    def groups(self, queries: int, budget: int = BUDGET) -> list[slice]:
        """The queries in groups whose float64 sums fit into so many bytes, at least one query each."""
        size = max(1, min(queries, budget // (8 * max(1, self.open))))
        return [slice(at, min(at + size, queries)) for at in range(0, queries, size)]
