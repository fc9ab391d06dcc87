"""What one part of the rows has to say about queries: pure functions, so that any process may look at any part."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from trainer_attrib.analysis.retrieval.best import best_places
from trainer_attrib.analysis.retrieval.groups import StageSums
from trainer_attrib.analysis.retrieval.plan import Plan
from trainer_attrib.analysis.retrieval.visits import PartVisits, means, named


@dataclass(frozen=True)
class PartSums:
    """Scores of a part's examples, summed over their rows in it, [Q, N]; and the sums over groups of rows."""

    visits: PartVisits
    sums: np.ndarray
    groups: StageSums


@dataclass(frozen=True)
class TopK:
    """What can still be among the best, of the examples of one part.

    Args:
        ids: of those of its examples that are told of below, [C].
        last_steps: of each in this part, [C].
        scores: of both ends of those that are in no other part, largest first, float32 [2, Q, K].
        places: which of the C they are of, [2, Q, K].
        open_sums: of the scores in this part of the examples that are in other parts too, [Q, M].
        ended: which of the C are those of the M that are in no later part, [E].
        groups: sums over groups of all rows; None where they were not asked for.
    """

    ids: pa.StringArray
    last_steps: np.ndarray
    scores: np.ndarray
    places: np.ndarray
    open_sums: np.ndarray
    ended: np.ndarray
    groups: StageSums | None


def top_k(found: PartSums, plan: Plan, number: int, queries: slice, keep: int, *, sums: bool, groups: bool) -> TopK:
    """The answer of a part to which scores are the best, small whatever the size of the part.

    Args:
        found: all scores of the part.
        plan: of all parts.
        number: of the part in it.
        queries: that are asked about.
        keep: K.
        sums: an example's score is the sum over its rows, not their mean.
        groups: whether sums over groups are wanted.
    """
    visits, asked_QN = found.visits, found.sums[queries]
    open_M, _, ended_M = plan.open_in(number)
    closed_N = np.ones(len(visits.ids), bool)
    closed_N[open_M] = False
    at = np.flatnonzero(closed_N)
    scores_QN = means(asked_QN[:, at] if len(open_M) else asked_QN, visits.counts[at], sums=sums)

    def ids(_: int, places: np.ndarray) -> np.ndarray:
        return named(visits.ids, at[places])

    both = [best_places(scores_QN, keep, ids, largest=end) for end in (True, False)]
    scores = np.stack([np.take_along_axis(scores_QN, places, 1) for places in both])
    places, ended = np.stack([at[places] for places in both]), open_M[ended_M]
    told_N = np.zeros(len(closed_N), bool)
    told_N[places], told_N[ended] = True, True
    told, number_N = np.flatnonzero(told_N), np.cumsum(told_N, dtype=np.int32) - 1
    return TopK(
        ids=visits.ids.take(pa.array(told)),
        last_steps=visits.last_steps[told],
        scores=scores,
        places=number_N[places],
        open_sums=asked_QN[:, open_M],
        ended=number_N[ended],
        groups=found.groups if groups else None,
    )
