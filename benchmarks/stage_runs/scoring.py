"""How effects are held against the truth.

A *cell* is one regime, seed, stage and kind of behavior (losses, margins): a vector over the queries. Stages are all
but the last one. Columns of the table, for each method and regime:

pearson, spearman   over a cell's queries; mean over cells (3 seeds x 3 stages x 2 kinds)
rel. error          norm of a cell's errors over the norm of its true effects; median over cells
per query           |error| / |true effect| of each query; median over all
top-1               share of queries whose stage with the largest |effect| is the truly largest; mean over seeds, kinds
cost                gradients of whole batches over the optimizer steps of the later stages
bar spearman        of error bars and |errors|, over all queries, stages and seeds of a kind; mean over kinds
cell oracle         the same of a bar that knew the root mean square error of every cell, which no method knows
query oracle        the same of a bar that knew every query's standard error, were errors normal around 0 and standard
                    errors log-normal: log |error| = log(standard error) + log |z|, and the last term, of the variance
                    pi^2 / 8, is nothing that a bar can know; by simulation, the variance of log |error| being as it is
of cells            the same of cells: norm(bars) / norm(effects) and the cell's rel. error
covered             share of errors within their bars
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Row = dict[str, Any]
ROUNDING = 1e-12
"""Errors up to this are none."""


@dataclass(frozen=True)
class Cell:
    """Effects of one stage on all queries of one behavior, beside the truth. Arrays [Q], queries in one order."""

    regime: str
    seed: int
    stage: str
    behavior: str
    order: int
    effects: np.ndarray
    bars: np.ndarray
    true: np.ndarray
    cost: float

    @property
    def errors(self) -> np.ndarray:
        """Absolute, infinite where nothing finite was said."""
        return np.nan_to_num(np.abs(self.effects - self.true), nan=np.inf)

    @property
    def relative(self) -> float:
        """Norm of the errors over the norm of the true effects."""
        return float(np.linalg.norm(self.errors) / np.linalg.norm(self.true))

    @property
    def relative_bar(self) -> float:
        """Norm of the bars over the norm of the effects."""
        norm = float(np.linalg.norm(self.effects))
        return float(np.linalg.norm(self.bars)) / norm if norm > 0 else float("inf")


def cells(rows: Iterable[Row], truth: Iterable[Row]) -> list[Cell]:
    """Rows of one method and of the truth, put together."""
    true = {_key(row): row for row in truth}
    groups: dict[tuple[Any, ...], list[Row]] = defaultdict(list)
    for row in rows:
        groups[(row["regime"], row["seed"], row["stage"], row["behavior"], row["order"])].append(row)
    return [
        Cell(
            regime,
            seed,
            stage,
            behavior,
            order,
            np.array([row["effect"] for row in group]),
            np.array([row["bar"] for row in group]),
            np.array([true[_key(row)]["effect"] for row in group]),
            group[0]["cost"],
        )
        for (regime, seed, stage, behavior, order), group in groups.items()
    ]


def permuted(truth: Sequence[Row]) -> list[Row]:
    """The control: true effects of a seed and kind given to other stages and queries, with bars of such a size."""
    draw, groups = np.random.default_rng(0), defaultdict(list)
    for row in truth:
        groups[(row["regime"], row["seed"], row["behavior"])].append(row)
    return [
        {**row, "effect": other["effect"], "bar": abs(third["effect"]), "cost": 0.0}
        for group in groups.values()
        for row, other, third in zip(group, draw.permutation(group), draw.permutation(group), strict=True)
    ]


def scored(regime: str, method: str, found: Sequence[Cell]) -> Row:
    """A row of the table."""
    each = np.concatenate([cell.errors / np.abs(cell.true) for cell in found])
    inside = np.concatenate([cell.errors <= cell.bars + ROUNDING for cell in found])
    kinds = _grouped(found, lambda c: c.behavior)
    return {
        "regime": regime,
        "method": method,
        "pearson": _mean(correlation(c.effects, c.true) for c in found),
        "spearman": _mean(correlation(ranks(c.effects), ranks(c.true)) for c in found),
        "rel. error": float(np.median([c.relative for c in found])),
        "per query": float(np.median(each)),
        "top-1": _mean(_top(group) for group in _grouped(found, lambda c: (c.regime, c.seed, c.behavior, c.order))),
        "cost": _mean(c.cost for c in found),
        "bar spearman": _mean(_bars(group, [cell.bars for cell in group]) for group in kinds),
        "cell oracle": _mean(_bars(group, [_alike(cell) for cell in group]) for group in kinds),
        "query oracle": _mean(_knowable(group) for group in kinds),
        "of cells": correlation(ranks([c.relative_bar for c in found]), ranks([c.relative for c in found])),
        "covered": float(np.mean(inside)),
    }


def by_stage(found: Sequence[Cell]) -> dict[str, Row]:
    """Pearson and relative error of each stage."""
    groups = {group[0].stage: group for group in _grouped(found, lambda c: c.stage)}
    return {
        stage: {
            "pearson": round(_mean(correlation(c.effects, c.true) for c in group), 4),
            "rel. error": round(float(np.median([c.relative for c in group])), 4),
            "true size": round(_mean(float(np.sqrt(np.mean(c.true**2))) for c in group if c.behavior == "loss"), 4),
        }
        for stage, group in groups.items()
    }


def correlation(a: Any, b: Any) -> float:
    """Pearson's; 0 where one of the two is constant or not finite."""
    a, b = np.asarray(a, float), np.asarray(b, float)
    if not (np.isfinite(a).all() and np.isfinite(b).all()) or np.std(a) == 0 or np.std(b) == 0:
        return 0.0
    return float(np.corrcoef(a, b)[0, 1])


def ranks(values: Any) -> np.ndarray:
    """From 0, equal values with the mean of theirs; infinities last."""
    values = np.nan_to_num(np.asarray(values, float), nan=np.inf)
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts + 1) / 2)[inverse]


def _top(group: Sequence[Cell]) -> float:
    sizes, true = (np.abs([getattr(cell, what) for cell in group]) for what in ("effects", "true"))
    return float(np.mean(np.nan_to_num(sizes, nan=np.inf).argmax(0) == true.argmax(0)))


def _bars(group: Sequence[Cell], bars: Sequence[np.ndarray]) -> float:
    return correlation(ranks(np.concatenate(bars)), ranks(np.concatenate([cell.errors for cell in group])))


def _alike(cell: Cell) -> np.ndarray:
    """The root mean square error for every query."""
    return np.full_like(cell.errors, np.sqrt(np.mean(cell.errors**2)))


def _knowable(group: Sequence[Cell]) -> float:
    """How well standard errors rank errors, were they known."""
    errors = np.concatenate([cell.errors for cell in group])
    known = np.log(errors[np.isfinite(errors) & (errors > ROUNDING)])
    spread = max(float(np.var(known)) - np.pi**2 / 8, 0.0) ** 0.5 if known.size else 0.0
    standard, chance = np.random.default_rng(0).normal(size=(2, 50_000))
    return correlation(ranks(spread * standard), ranks(spread * standard + np.log(np.abs(chance))))


def _grouped(found: Sequence[Cell], key: Callable[[Cell], Any]) -> list[list[Cell]]:
    groups: dict[Any, list[Cell]] = defaultdict(list)
    for cell in found:
        groups[key(cell)].append(cell)
    return list(groups.values())


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return float(np.mean(found)) if found else float("nan")


def _key(row: Row) -> tuple[Any, ...]:
    return (row["regime"], row["seed"], row["stage"], row["behavior"], row["query"])
