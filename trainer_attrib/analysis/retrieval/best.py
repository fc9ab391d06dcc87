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
    what ties at the bar is sorted.
    """
    count = scores_QN.shape[1]
    if count <= keep:
        return np.broadcast_to(np.arange(count), (len(scores_QN), count))
    unknown_QN = np.isnan(scores_QN)
    keys_QN = np.where(unknown_QN, -np.inf if largest else np.inf, scores_QN) if unknown_QN.any() else scores_QN
    if largest:
        places_QK = np.argpartition(keys_QN, count - keep, axis=1)[:, count - keep :]
    else:
        places_QK = np.argpartition(keys_QN, keep - 1, axis=1)[:, :keep]
    chosen_QK = np.take_along_axis(keys_QN, places_QK, 1)
    bars_Q1 = (chosen_QK.min if largest else chosen_QK.max)(1, keepdims=True)
    tied_Q = (keys_QN == bars_Q1).sum(1) > (chosen_QK == bars_Q1).sum(1)
    for query in np.flatnonzero(tied_Q).tolist():
        keys_N, bar = keys_QN[query], bars_Q1[query, 0]
        sure = np.flatnonzero(keys_N > bar if largest else keys_N < bar)
        tied = np.flatnonzero((keys_N == bar) & ~unknown_QN[query])
        if len(sure) + len(tied) >= keep:  # otherwise what ties are NaN
            first = rank(scores_QN[query, tied], ids(query, tied), keep - len(sure), largest=largest)
            places_QK[query] = np.concatenate([sure, tied[first]])
    return places_QK
