"""Another ranking of the same examples for the same queries, shown beside every influence so that nobody mistakes what
any ranking would have found for a merit of the method."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

TOP = 10  # examples of each ranking that are compared


@dataclass(frozen=True)
class Beside:
    """What a control ranks first.

    Attributes:
        name: of the ranking.
        top: positions of each query's best examples, best first, int64 [Q, k].
        shared: float64 [Q], how many of them are also among the k best by the scores that it stands beside; for
            ``random`` the number to expect.
    """

    name: str
    top: np.ndarray
    shared: np.ndarray

    @property
    def mean(self) -> float:
        """Mean of ``shared`` over the queries."""
        return float(self.shared.mean())

    @property
    def standard_error(self) -> float:
        """Of the mean, over queries; nan where there is one."""
        return float(self.shared.std(ddof=1) / len(self.shared) ** 0.5) if len(self.shared) > 1 else float("nan")

    def first(self, queries: int) -> Beside:
        """The same for the first queries only."""
        return Beside(self.name, self.top[:queries], self.shared[:queries])


def compared(name: str, scores_QN: np.ndarray, ours_QK: np.ndarray) -> Beside:
    """A control from its scores [Q, N], beside the best examples by ours, [Q, k]. Ties are broken at random: lexical
    scores tie often, and an order such as that of ids may know the answer."""
    random = np.random.default_rng(0)
    order = [np.lexsort((random.random(len(row)), -row))[: ours_QK.shape[1]] for row in scores_QN]
    shared = [len(np.intersect1d(own, other)) for own, other in zip(ours_QK, order, strict=True)]
    return Beside(name, np.array(order, np.int64), np.array(shared, np.float64))


def by_chance(queries: int, examples: int, k: int, seed: int = 0) -> Beside:
    """Examples drawn at random, and how many of k are expected to be among k given ones."""
    random = np.random.default_rng(seed)
    order = [random.choice(examples, min(k, examples), replace=False) for _ in range(queries)]
    return Beside("random", np.array(order, np.int64), np.full(queries, k * k / max(1, examples)))


def said(beside: Sequence[Beside]) -> str:
    """One line for people; empty where there is nothing beside."""
    if not beside:
        return ""
    k = beside[0].top.shape[1]
    bars = [f" ± {b.standard_error:.1f}" if b.standard_error > 0 else "" for b in beside]
    parts = [f"{b.name} {b.mean:.1f}{bar}" for b, bar in zip(beside, bars, strict=True)]
    return f"of the top {k}, so many are also in the top {k} of: {', '.join(parts)}"
