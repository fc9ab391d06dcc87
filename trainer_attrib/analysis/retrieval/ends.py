"""Both ends of every ranking in one stream, without holding a score of every example."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from trainer_attrib.analysis.retrieval.best import best_places
from trainer_attrib.analysis.retrieval.part_scores import TopK
from trainer_attrib.analysis.retrieval.visits import Found, PartVisits, means, named
from trainer_attrib.numerics.scores import rank

BUDGET = 1 << 30  # bytes of running sums


@dataclass(frozen=True)
class PartSources:
    """The data sources of the examples of each part, without a copy of a name for each.

    Args:
        names: of the sources.
        codes: which of them each example has, by number, [N].
        numbers: of the examples of each part.
    """

    names: Sequence[str | None]
    codes: np.ndarray
    numbers: Sequence[np.ndarray]

    def of(self, part: int) -> list[str | None]:
        """Of the examples of one part, in its order."""
        return [self.names[code] for code in self.codes[self.numbers[part]].tolist()]


@dataclass(frozen=True)
class Plan:
    """What is known of a stage's visits before its sketches are read: in which parts each example is.

    An example that is in one part only is *closed* there: its score is known when that part is scored. Of others sums
    are held while they are *open*, between their first part and their last. In a stage of one epoch none are; over
    several epochs all may be, and then the queries are split so that their sums fit a budget, one stream over the rows
    for each group of them.

    Args:
        ids: of all N examples, in the order of their first row; not as Python's strings, of which a million are many.
        counts: rows of each, [N].
        last_steps: in which each took part, [N].
        numbers: which examples are in each part.
        first: part of each, [N].
        last: part of each, [N].
    """

    ids: pa.LargeStringArray
    counts: np.ndarray
    last_steps: np.ndarray
    numbers: list[np.ndarray]
    first: np.ndarray
    last: np.ndarray

    @staticmethod
    def of(parts: Iterable[PartVisits]) -> Plan:
        """Of all parts, in the order in which they will be scored."""
        seen = list(parts)
        ids, at_all = _encoded([pa.array([], pa.string()), *(part.ids for part in seen)])
        numbers = np.split(at_all, np.cumsum([len(part.ids) for part in seen])[:-1]) if seen else []
        counts, last_steps = np.zeros(len(ids), np.int64), np.zeros(len(ids), np.int64)
        first, last = np.zeros(len(ids), np.int32), np.zeros(len(ids), np.int32)
        for block, (part, at) in reversed(list(enumerate(zip(seen, numbers, strict=True)))):
            counts[at] += part.counts
            last_steps[at] = np.maximum(last_steps[at], part.last_steps)
            last[at] = np.maximum(last[at], block)
            first[at] = block
        return Plan(ids, counts, last_steps, numbers, first, last)

    def sources(self, examples: pa.Table) -> PartSources:
        """The sources of the examples of each part, from the ledger's columns example and source."""
        at = _encoded([self.ids, *examples["example"].chunks])[1][len(self.ids) :]
        encoded, here = examples["source"].combine_chunks().dictionary_encode(), at < len(self.ids)
        codes_N = np.full(len(self.ids), -1, np.int32)
        codes_N[at[here]] = encoded.indices.fill_null(-1).to_numpy(zero_copy_only=False)[here]
        return PartSources([*encoded.dictionary.to_pylist(), None], codes_N, self.numbers)

    @property
    def closed(self) -> list[np.ndarray]:
        """Whether each example of each part is in no other part."""
        alone = self.first == self.last
        return [alone[numbers_N] for numbers_N in self.numbers]

    def ended(self, part: int) -> np.ndarray:
        """Which examples of a part are in no later one, their numbers."""
        numbers_N = self.numbers[part]
        return numbers_N[self.last[numbers_N] == part]

    @property
    def open(self) -> int:
        """The largest number of examples that are open at once."""
        several = self.first != self.last
        if not several.any():
            return 0
        begun = np.bincount(self.first[several], minlength=len(self.numbers)).cumsum()
        ended = np.bincount(self.last[several], minlength=len(self.numbers)).cumsum()
        return int((begun - np.concatenate([[0], ended[:-1]])).max())

    def groups(self, queries: int, budget: int = BUDGET) -> list[slice]:
        """The queries in groups whose float64 sums fit into so many bytes, at least one query each."""
        size = max(1, min(queries, budget // (8 * max(1, self.open))))
        return [slice(at, min(at + size, queries)) for at in range(0, queries, size)]


def _encoded(ids: Sequence[pa.Array]) -> tuple[pa.LargeStringArray, np.ndarray]:
    """Different ids in the order in which they first appear, and which of them each is."""
    whole = pa.concat_arrays([part.cast(pa.large_string()) for part in ids])  # strings of 32 bits end at 2 GB of them
    encoded = whole.dictionary_encode()
    return encoded.dictionary, encoded.indices.to_numpy(zero_copy_only=False)


class Ends:
    """The k largest and the k smallest scores of every query; equal scores by id, the smallest ids being kept.

    The sums over an example's visits are made as :class:`AllScores` makes them, so the scores are the same bits.

    Args:
        plan: of all parts that will come.
        queries: Q.
        keep: k.
        sums: an example's score is the sum over its visits, not their mean.
    """

    def __init__(self, plan: Plan, queries: int, keep: int, *, sums: bool) -> None:
        self._plan, self._keep, self._sums, self._part = plan, keep, sums, 0
        self._slots = np.full(len(plan.ids), -1, np.int64)
        self._free = list(range(plan.open))[::-1]
        self._open_QS = np.zeros((queries, plan.open))
        nothing: tuple[np.ndarray, np.ndarray] = np.zeros((queries, 0), np.float32), np.zeros((queries, 0), np.int64)
        self._held = [nothing, nothing]  # scores and numbers of the largest, of the smallest

    def add(self, part: TopK) -> None:
        """Take in the answer of the next part."""
        numbers_N = self._plan.numbers[self._part]
        open_M = numbers_N[part.open]
        new = open_M[self._slots[open_M] < 0]
        self._slots[new] = [self._free.pop() for _ in range(len(new))]
        self._open_QS[:, self._slots[open_M]] += part.open_sums
        ended = self._plan.ended(self._part)
        ended = ended[self._slots[ended] >= 0]
        slots = self._slots[ended]
        scores_QF = means(self._open_QS[:, slots], self._plan.counts[ended], sums=self._sums)
        self._open_QS[:, slots], self._slots[ended] = 0, -1
        self._free.extend(slots.tolist())
        numbers_QF = np.broadcast_to(ended, scores_QF.shape)
        for end in range(2):
            self._offer(end, [part.scores[end], scores_QF], [numbers_N[part.places[end]], numbers_QF])
        self._part += 1

    def found(self) -> Found:
        """The scores at both ends, each example once; NaN where there are fewer than 2k."""
        (tops, top_numbers), (bottoms, bottom_numbers) = self._held
        scores, numbers = np.concatenate([tops, bottoms], 1), np.concatenate([top_numbers, bottom_numbers], 1)
        kept = [_once(*of_one) for of_one in zip(scores, numbers, strict=True)]
        width = max((len(numbers) for _, numbers in kept), default=0)
        shape = len(kept), width
        scores, numbers_QM = np.full(shape, np.nan, np.float32), np.zeros(shape, np.int64)
        for query, (found, numbers) in enumerate(kept):
            scores[query, : len(found)], numbers_QM[query, : len(found)] = found, numbers
        known = np.unique(np.concatenate([np.zeros(0, np.int64), *(numbers for _, numbers in kept)]))
        places = np.where(np.isnan(scores), 0, np.searchsorted(known, numbers_QM))
        return Found(named(self._plan.ids, known).tolist(), self._plan.last_steps[known], scores, places)

    def _offer(self, end: int, scores: list[np.ndarray], numbers: list[np.ndarray]) -> None:
        """Keep the best of what is held and what comes."""
        held_scores, held_numbers = self._held[end]
        scores_QM = np.concatenate([held_scores, *scores], axis=1)
        numbers_QM = np.concatenate([held_numbers, *numbers], axis=1)

        def ids(query: int, places: np.ndarray) -> np.ndarray:
            return named(self._plan.ids, numbers_QM[query, places])

        places = best_places(scores_QM, self._keep, ids, largest=end == 0)
        self._held[end] = np.take_along_axis(scores_QM, places, 1), np.take_along_axis(numbers_QM, places, 1)


def _once(scores_M: np.ndarray, numbers_M: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scores and numbers of both ends of one query, each example once, without NaN."""
    known = ~np.isnan(scores_M)
    numbers, first = np.unique(numbers_M[known], return_index=True)
    return scores_M[known][first], numbers


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
