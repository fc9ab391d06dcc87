"""Both ends of every ranking in one stream, without holding a score of every example."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from trainer_attrib.analysis.retrieval.best import best_places
from trainer_attrib.analysis.retrieval.part_scores import TopK
from trainer_attrib.analysis.retrieval.plan import Plan
from trainer_attrib.analysis.retrieval.visits import Found, means, named
from trainer_attrib.numerics.scores import rank


class Ends:
    """The k largest and the k smallest scores of every query; equal scores by id, the smallest ids being kept.

    The sums over an example's visits are made as :class:`AllScores` makes them, so the scores are the same bits. What
    is held grows with the queries, with k and with the examples that are open at once, not with the examples.

    Args:
        plan: of all parts that will come.
        queries: Q.
        keep: k.
        sums: an example's score is the sum over its visits, not their mean.
    """

    def __init__(self, plan: Plan, queries: int, keep: int, *, sums: bool) -> None:
        self._plan, self._keep, self._sums, self._part = plan, keep, sums, 0
        self._slots = np.full(len(plan.counts), -1, np.int32)
        self._free = list(range(plan.open))[::-1]
        self._open_QS = np.zeros((queries, plan.open))
        nothing: tuple[np.ndarray, np.ndarray] = np.zeros((queries, 0), np.float32), np.zeros((queries, 0), np.int64)
        self._held = [nothing, nothing]  # scores and numbers of the largest, of the smallest
        self._ids, self._last_steps = pa.array([], pa.string()), np.zeros(0, np.int32)  # by number

    def add(self, part: TopK) -> None:
        """Take in the answer of the next part."""
        before = len(self._ids)
        self._ids = pa.concat_arrays([self._ids, part.ids])
        self._last_steps = np.concatenate([self._last_steps, part.last_steps])
        ended_QE, last_steps_E = self._ended(part.open_sums)
        self._last_steps[before + part.ended] = last_steps_E
        numbers_QE = np.broadcast_to(before + part.ended, ended_QE.shape)
        for end in range(2):
            self._offer(end, [part.scores[end], ended_QE], [before + part.places[end], numbers_QE])
        self._part += 1
        self._forget()

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
        return Found(named(self._ids, known).tolist(), self._last_steps[known].astype(np.int64), scores, places)

    def _ended(self, open_sums_QM: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Scores, float32 [Q, E], and last steps of the open examples whose last part this is."""
        _, numbers_M, ended_M = self._plan.open_in(self._part)
        new = numbers_M[self._slots[numbers_M] < 0]
        self._slots[new] = [self._free.pop() for _ in range(len(new))]
        self._open_QS[:, self._slots[numbers_M]] += open_sums_QM
        ended = numbers_M[ended_M]
        slots = self._slots[ended]
        scores_QE = means(self._open_QS[:, slots], self._plan.counts[ended], sums=self._sums)
        self._open_QS[:, slots], self._slots[ended] = 0, -1
        self._free.extend(slots.tolist())
        return scores_QE, self._plan.last_steps[ended]

    def _offer(self, end: int, scores: list[np.ndarray], numbers: list[np.ndarray]) -> None:
        """Keep the best of what is held and what comes."""
        held_scores, held_numbers = self._held[end]
        scores_QM = np.concatenate([held_scores, *scores], axis=1)
        numbers_QM = np.concatenate([held_numbers, *numbers], axis=1)

        def ids(query: int, places: np.ndarray) -> np.ndarray:
            return named(self._ids, numbers_QM[query, places])

        places = best_places(scores_QM, self._keep, ids, largest=end == 0)
        self._held[end] = np.take_along_axis(scores_QM, places, 1), np.take_along_axis(numbers_QM, places, 1)

    def _forget(self) -> None:
        """Drop ids and steps that nothing held refers to, once they are the most."""
        held = [numbers for _, numbers in self._held]
        if len(self._ids) <= 2 * sum(numbers.size for numbers in held) + 4096:
            return
        used, back = np.unique(np.concatenate([numbers.ravel() for numbers in held]), return_inverse=True)
        self._ids, self._last_steps = self._ids.take(pa.array(used)), self._last_steps[used]
        for end, numbers in enumerate(np.split(back, [held[0].size])):
            self._held[end] = self._held[end][0], numbers.reshape(held[end].shape)


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
    if len(groups) == 1:
        return groups[0]
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
