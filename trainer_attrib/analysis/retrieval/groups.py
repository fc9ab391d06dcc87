"""Sums of scores over groups of rows: those of a data source, those of a range of steps."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from trainer_attrib.report.blocks import Grid

SHOWN = 12  # rows of a table of groups
FEW = 32  # labels whose sums are a product with ones and zeros: up to here that is the fastest


@dataclass
class Sums:
    """Sums and counts by label, for every query. Scores that are not a number are in neither."""

    labels: dict[Hashable, int] = field(default_factory=dict)
    sums: np.ndarray = field(default_factory=lambda: np.zeros((0, 0)))  # [Q, labels]
    counts: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), np.int64))

    def add(self, labels: Sequence[Hashable], at_N: np.ndarray, scores_QN: np.ndarray) -> None:
        """Add scores whose labels are at these places of a list of different ones."""
        places = np.array([self.labels.setdefault(label, len(self.labels)) for label in labels], np.int64)
        sums, counts = _totals(at_N, scores_QN, len(places)), np.bincount(at_N, minlength=len(places))
        if np.isnan(sums).any():
            unknown_QN = np.isnan(scores_QN)
            sums = _totals(at_N, np.where(unknown_QN, 0.0, scores_QN), len(places))
            counts = counts - _totals(at_N, unknown_QN, len(places)).astype(np.int64)
        self._grow(len(scores_QN))
        self.sums[:, places] += sums
        self.counts[:, places] += counts

    def merge(self, other: Sums) -> None:
        """Add the sums of other rows."""
        places = np.array([self.labels.setdefault(label, len(self.labels)) for label in other.labels], np.int64)
        if len(places):
            self._grow(len(other.sums))
            self.sums[:, places] += other.sums
            self.counts[:, places] += other.counts

    def _grow(self, queries: int) -> None:
        old = self.sums.shape[1]
        if old < len(self.labels) or not len(self.sums):
            sums, counts = np.zeros((queries, len(self.labels))), np.zeros((queries, len(self.labels)), np.int64)
            if old:
                sums[:, :old], counts[:, :old] = self.sums, self.counts
            self.sums, self.counts = sums, counts


@dataclass
class StageSums:
    """The sums of one stage, by source and by step."""

    stage: str
    by_source: Sums = field(default_factory=Sums)
    by_step: Sums = field(default_factory=Sums)

    def merge(self, other: StageSums) -> None:
        """Add the sums of other rows of the stage."""
        self.by_source.merge(other.by_source)
        self.by_step.merge(other.by_step)

    def add(self, sources: Sequence[str | None], of_N: np.ndarray, steps: np.ndarray, scores_QN: np.ndarray) -> None:
        """Take in scores of rows.

        Args:
            sources: different ones.
            of_N: which of them each row has; negative ones count from the end.
            steps: of the rows, [N].
            scores_QN: their scores.
        """
        scores_QN = scores_QN.astype(np.float64)
        self.by_source.add(*_used(sources, of_N), scores_QN)
        found, at_N = _runs(steps)
        self.by_step.add(found.tolist(), at_N, scores_QN)


def _used(labels: Sequence[Hashable], at_N: np.ndarray) -> tuple[list[Hashable], np.ndarray]:
    """The labels that occur, in the order in which they do first, and which of them each row has."""
    codes_N, first = at_N % max(1, len(labels)), np.full(len(labels), len(at_N))
    first[codes_N[::-1]] = np.arange(len(at_N))[::-1]  # of what is written to one place the last stays
    order = np.argsort(first)[: np.count_nonzero(first < len(at_N))]
    place = np.zeros(len(labels), np.int64)
    place[order] = np.arange(len(order))
    return [labels[code] for code in order], place[codes_N]


def _runs(values_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Different values in ascending order, and which of them each is; where they ascend nothing is sorted."""
    rises = np.diff(values_N, prepend=values_N[:1])
    if (rises < 0).any():
        return np.unique(values_N, return_inverse=True)
    at_N = np.cumsum(rises > 0)
    return values_N[np.flatnonzero(np.append(len(values_N) > 0, rises[1:] > 0))], at_N


def _totals(at_N: np.ndarray, values_QN: np.ndarray, labels: int) -> np.ndarray:
    """Sums by label, float64 [Q, labels], without sorting the rows. Infinity times zero reaches other labels: then the
    product is not taken."""
    if labels <= FEW:
        # By torch: numpy's product wakes threads of its own on every core, which then wait busily beside torch's.
        values = torch.from_numpy(values_QN.astype(np.float64, copy=False))
        sums = (values @ torch.eye(labels, dtype=torch.float64)[torch.from_numpy(at_N)]).numpy()
        if np.isfinite(sums).all():
            return sums
    return np.array([np.bincount(at_N, row, labels) for row in values_QN]).reshape(len(values_QN), labels)


def source_rows(stages: Sequence[StageSums], query: int) -> list[dict[str, Any]]:
    """Of one query: stage, source, sum, mean and count of every source."""
    return [
        {"stage": stage.stage, "source": source, **_figures(stage.by_source, query, np.array([place]))}
        for stage in stages
        for source, place in stage.by_source.labels.items()
    ]


def step_rows(stages: Sequence[StageSums], query: int, bins: int | Sequence[int]) -> list[dict[str, Any]]:
    """Of one query: stage, first_step, last_step, sum, mean and count of every range of steps.

    Args:
        bins: so many ranges of equal length of each stage's steps, or the first step of each range.
    """
    found = []
    for stage in stages:
        steps = np.array(list(stage.by_step.labels), np.int64)
        if not len(steps):
            continue
        count = min(bins, int(steps.max() - steps.min()) + 1) if isinstance(bins, int) else 0
        spread = np.linspace(steps.min(), steps.max() + 1, count + 1)[:-1]
        starts = np.ceil(spread).astype(int).tolist() if count else sorted(int(at) for at in bins)  # type: ignore[union-attr]
        for first, after in zip(starts, [*starts[1:], max(int(steps.max()) + 1, starts[-1] + 1)], strict=True):
            places = np.flatnonzero((steps >= first) & (steps < after))
            place = {"stage": stage.stage, "first_step": first, "last_step": after - 1}
            found.append({**place, **_figures(stage.by_step, query, places)})
    return found


def _figures(sums: Sums, query: int, places: np.ndarray) -> dict[str, Any]:
    total, count = float(sums.sums[query, places].sum()), int(sums.counts[query, places].sum())
    return {"sum": total, "mean": total / count if count else float("nan"), "count": count}


def group_grids(stages: Sequence[StageSums], behaviors: Sequence[str]) -> list[Grid]:
    """Tables by source, where there are several, and by step; means over the queries of each behavior.

    Args:
        stages: the sums.
        behaviors: of each query.
    """
    if not any(stage.by_step.labels for stage in stages):
        return []
    note = "Sums and means of the scores of all recorded rows, means over the queries of a behavior."
    grids = []
    if len({source for stage in stages for source in stage.by_source.labels}) > 1:
        sources = [source_rows(stages, query) for query in range(len(behaviors))]
        grids.append(_grid("Influence of data sources", "source", sources, behaviors, note))
    steps = [step_rows(stages, query, 4) for query in range(len(behaviors))]
    steps = [[row | {"steps": f"{row['first_step']} to {row['last_step']}"} for row in rows] for rows in steps]
    return [*grids, _grid("Influence of steps", "steps", steps, behaviors, note)]


def _grid(title: str, label: str, by_query: list[list[dict[str, Any]]], behaviors: Sequence[str], note: str) -> Grid:
    rows: list[tuple[Any, ...]] = []
    for behavior in dict.fromkeys(behaviors):
        chosen = [found for found, name in zip(by_query, behaviors, strict=True) if name == behavior]
        means = [_mean(behavior, label, same) for same in zip(*chosen, strict=True)]
        shown = sorted(range(len(means)), key=lambda at: -abs(means[at][3]))[:SHOWN]
        rows += [means[at] for at in sorted(shown)]
    return Grid(title, ("behavior", "stage", label, "sum", "mean", "rows"), rows, note)


def _mean(behavior: str, label: str, same: Sequence[dict[str, Any]]) -> tuple[Any, ...]:
    """The row of one group, mean over queries."""
    total, mean = (float(np.mean([row[key] for row in same])) for key in ("sum", "mean"))
    return behavior, same[0]["stage"], same[0][label] or "(none)", total, mean, max(row["count"] for row in same)
