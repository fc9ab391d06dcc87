"""What one part of the rows has to say about queries: pure functions, so that any process may look at any part."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from trainer_attrib.analysis.retrieval.best import best_places
from trainer_attrib.analysis.retrieval.groups import StageSums
from trainer_attrib.analysis.retrieval.visits import PartVisits, means, named


@dataclass(frozen=True)
class PartSums:
    """Scores of a part's examples, summed over their rows in it, float64 [Q, N]; and the sums over groups of rows."""

    visits: PartVisits
    sums: np.ndarray
    groups: StageSums


@dataclass(frozen=True)
class TopK:
    """What can still be among the best, of the examples of one part.

    Args:
        scores: of both ends of those that are in no other part, largest first, float32 [2, Q, K].
        places: which of the part's examples they are of, [2, Q, K].
        open: the part's examples that are in other parts too, [M].
        open_sums: of their scores in this part, float64 [Q, M].
        groups: sums over groups of all rows; None where they were not asked for.
    """

    scores: np.ndarray
    places: np.ndarray
    open: np.ndarray
    open_sums: np.ndarray
    groups: StageSums | None


def top_k(found: PartSums, closed: np.ndarray, queries: slice, keep: int, *, sums: bool, groups: bool) -> TopK:
    """The answer of a part to which scores are the best, small whatever the size of the part.

    Args:
        found: all scores of the part.
        closed: whether each of its examples is in no other part, [N].
        queries: that are asked about.
        keep: K.
        sums: an example's score is the sum over its rows, not their mean.
        groups: whether sums over groups are wanted.
    """
    at, open_at = np.flatnonzero(closed), np.flatnonzero(~closed)
    asked_QN = found.sums[queries]
    scores_QN = means(asked_QN if len(at) == len(closed) else asked_QN[:, at], found.visits.counts[at], sums=sums)

    def ids(_: int, places: np.ndarray) -> np.ndarray:
        return named(found.visits.ids, at[places])

    both = [best_places(scores_QN, keep, ids, largest=end) for end in (True, False)]
    scores = np.stack([np.take_along_axis(scores_QN, places, 1) for places in both])
    open_sums = asked_QN[:, open_at]
    return TopK(scores, np.stack([at[places] for places in both]), open_at, open_sums, found.groups if groups else None)
