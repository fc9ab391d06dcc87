"""The best of many scores, ties by id."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from trainer_attrib.numerics.scores import rank

Ids = Callable[[int, np.ndarray], np.ndarray]
"""Query and places [M] -> ids, strings [M]."""


def best_places(scores_QN: np.ndarray, keep: int, ids: Ids, *, largest: bool) -> np.ndarray:
    """Places of the ``keep`` largest or smallest scores of every query, in no order, [Q, min(keep, N)].

    NaN counts as the worst: it is among the places only where nothing else is left. Sorting by id is slow, so only
    what reaches the bar is sorted, and only where that is too many.
    """
    count = scores_QN.shape[1]
    if count <= keep:
        return np.broadcast_to(np.arange(count), (len(scores_QN), count))
    unknown_QN = np.isnan(scores_QN)
    keys_QN = np.where(unknown_QN, -np.inf if largest else np.inf, scores_QN) if unknown_QN.any() else scores_QN
    at = count - keep if largest else keep - 1
    bars_Q1 = np.partition(keys_QN, at, axis=1)[:, at, None]
    reached_QN = keys_QN >= bars_Q1 if largest else keys_QN <= bars_Q1
    reaching_Q = np.count_nonzero(reached_QN, axis=1)
    if (reaching_Q == keep).all():
        return (np.flatnonzero(reached_QN) % count).reshape(-1, keep)
    places_QK = np.empty((len(scores_QN), keep), np.int64)
    for query, reached_N in enumerate(reached_QN):
        near = np.flatnonzero(reached_N)
        if len(near) > keep:
            first = rank(scores_QN[query, near], ids(query, near), keep, largest=largest)
            near = near[np.append(first, np.flatnonzero(unknown_QN[query, near]))[:keep]]
        places_QK[query] = near
    return places_QK
