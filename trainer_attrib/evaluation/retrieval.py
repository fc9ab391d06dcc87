"""Shares of relevant examples among the top k, with their uncertainty and a random control."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class TopShare:
    """Mean over queries of the share of relevant examples among the top k, and its standard error over queries."""

    share: float
    standard_error: float

    def __str__(self) -> str:
        return f"{self.share:6.1%} ± {self.standard_error:.1%}"


def share_in_top(scores: np.ndarray, relevant: np.ndarray, k: int, seed: int = 0) -> TopShare:
    """Share of relevant examples among each query's k best.

    Ties are broken at random: lexical scores tie often, and an order such as that of ids may know the answer.

    Args:
        scores: [Q, N].
        relevant: boolean [N], the same examples for every query, or [Q, N].
        k: how many of each ranking.
        seed: of the order among ties.
    """
    relevant = np.broadcast_to(relevant, scores.shape)
    random = np.random.default_rng(seed)
    order = [np.lexsort((random.random(scores.shape[1]), -row))[:k] for row in scores]
    return _mean(np.array([marks[best].mean() for marks, best in zip(relevant, order, strict=True)]))


def random_share(relevant: np.ndarray, k: int, queries: int, seed: int = 0) -> TopShare:
    """The same figure for rankings drawn at random."""
    return share_in_top(np.zeros((queries, relevant.shape[-1])), relevant, k, seed)


def _mean(shares: np.ndarray) -> TopShare:
    spread = shares.std(ddof=1) / len(shares) ** 0.5 if len(shares) > 1 else 0.0
    return TopShare(float(shares.mean()), float(spread))
