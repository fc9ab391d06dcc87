"""Frozen answers. Tables, plots and pages render only these; nothing is computed here but means and rankings."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from trainer_attrib.analysis.tables import aligned, bars_of, in_figure, require_matplotlib
from trainer_attrib.report.blocks import Bar, Bars, Block, Grid, Notes, plain
from trainer_attrib.report.page import embedded, write_page

RELIABLE = 0.5  # an effect is called reliable while its error bar is at most this share of it


@dataclass(frozen=True)
class Effect:
    """Effect of one stage on one query by one method: behavior with the stage minus behavior without it.

    ``error_bar`` is in the behavior's unit; ``cost`` is in gradients of a whole batch of a later stage, which
    is what an optimizer step run again costs.
    """

    behavior: str
    query: str
    stage: str
    method: str
    read_out: str
    effect: float
    error_bar: float
    reliable: bool
    cost: float


@dataclass(frozen=True)
class Interaction:
    """By how much the effects of all stages on a behavior do not add up to what all of training changed.

    Values are means over the queries, in the behavior's unit.
    """

    behavior: str
    method: str
    whole: float
    explained: float

    @property
    def residual(self) -> float:
        """What training changed beyond the sum of the effects."""
        return self.whole - self.explained


class Result:
    """What every result can do."""

    caveats: tuple[str, ...]
    kind = "blocks"
    """How the explorer draws it."""

    def shown(self) -> dict[str, Any]:
        """JSON-ready, whole enough for a page to be drawn from it; ``kind`` says what is in it."""
        return {"name": type(self).__name__, "blocks": [plain(block) for block in self.blocks()]}

    def all_scores(self) -> pa.Table | None:
        """Scores of all examples, for whoever filters them: stage, example, step, then one column per query."""
        return None

    def blocks(self) -> list[Block]:
        """The result as blocks of a page."""
        raise NotImplementedError

    def report(self, path: str | os.PathLike[str]) -> Path:
        """Write one self-contained HTML file; returns its path."""
        return write_page(path, type(self).__name__, self.blocks())

    def plot(self) -> Any:
        """The result as a matplotlib figure. Needs the extra ``plot``."""
        raise NotImplementedError

    def _repr_html_(self) -> str:
        return embedded(self.blocks())


@dataclass(frozen=True, repr=False)
class StageEffects(Result):
    """Effects of stages on behaviors, one row per query."""

    rows: tuple[Effect, ...]
    caveats: tuple[str, ...] = ()
    interactions: tuple[Interaction, ...] = ()
    kind = "stage_effects"

    def shown(self) -> dict[str, Any]:
        """As :meth:`to_dict`, and the means over the queries."""
        return {**self.to_dict(), "means": [asdict(row) for row in self.summary()]}

    @staticmethod
    def of_shown(part: Mapping[str, Any]) -> StageEffects:
        """What :meth:`shown` was made of; numbers that JSON has no words for are NaN."""
        known: list[dict[str, Any]] = [
            {name: float("nan") if value is None else value for name, value in row.items()} for row in part["rows"]
        ]
        rows = (Effect(**row) for row in known)
        fields = ("behavior", "method", "whole", "explained")
        sums = (Interaction(**{name: found[name] for name in fields}) for found in part["interactions"])
        return StageEffects(tuple(rows), tuple(part["caveats"]), tuple(sums))

    def to_table(self) -> pa.Table:
        """Columns behavior, query, stage, method, read_out, effect, error_bar, reliable, cost."""
        return pa.Table.from_pylist([asdict(row) for row in self.rows])

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "rows": [asdict(row) for row in self.rows],
            "interactions": [asdict(found) | {"residual": found.residual} for found in self.interactions],
            "caveats": list(self.caveats),
        }

    def summary(self) -> list[Effect]:
        """Mean over the queries of each behavior, for each stage and method.

        The error bar of a mean is the mean of the error bars: estimates of one method err together, so that averaging
        queries does not shrink it.
        """
        groups: dict[tuple[str, str, str], list[Effect]] = {}
        for row in self.rows:
            groups.setdefault((row.behavior, row.stage, row.method), []).append(row)
        behaviors = list(dict.fromkeys(row.behavior for row in self.rows))
        return sorted((_mean(rows) for rows in groups.values()), key=lambda mean: behaviors.index(mean.behavior))

    def blocks(self) -> list[Block]:
        """Bars per behavior, the table of means, the caveats."""
        means = self.summary()
        charts = [
            Bars(
                f"Effect of each stage: {name}",
                [Bar(m.stage, m.method, m.effect, m.error_bar, m.reliable) for m in means if m.behavior == name],
                note="Behavior with the stage minus behavior without it, mean over the queries. Pale: not reliable.",
            )
            for name in dict.fromkeys(m.behavior for m in means)
        ]
        columns = ("behavior", "stage", "method", "queries", "effect", "error bar", "reliable", "cost")
        rows = [(m.behavior, m.stage, m.method, m.query, m.effect, m.error_bar, m.reliable, m.cost) for m in means]
        sums = [(i.behavior, i.method, i.whole, i.explained, i.residual) for i in self.interactions]
        header = ("behavior", "method", "changed by all of training", "sum of the effects", "interaction")
        grids = [
            Grid("Stage effects", columns, rows),
            *([Grid("Do the effects add up?", header, sums)] if sums else []),
        ]
        return [*charts, *grids, Notes("What to keep in mind", self.caveats)]

    def plot(self) -> Any:
        """A matplotlib figure with one axis per behavior. Needs the extra ``plot``."""
        pyplot, means = require_matplotlib(), self.summary()
        names = list(dict.fromkeys(m.behavior for m in means))
        figure, axes = pyplot.subplots(len(names), 1, squeeze=False, figsize=(7, 1 + 2 * len(names)), layout="tight")
        for axis, name in zip(axes[:, 0], names, strict=True):
            rows = [m for m in means if m.behavior == name][::-1]
            labels = [f"{m.stage}, {m.method}" for m in rows]
            bars_of(axis, labels, [m.effect for m in rows], [m.error_bar for m in rows])
            axis.set_title(in_figure(name))
        return figure

    def __repr__(self) -> str:
        means = {(m.behavior, m.stage, m.method): m for m in self.summary()}
        methods = list(dict.fromkeys(method for _, _, method in means))
        left = {(found.behavior, found.method): f"{found.residual:+.2f}" for found in self.interactions}
        rows = []
        for behavior in dict.fromkeys(b for b, *_ in means):
            stages = dict.fromkeys(s for b, s, _ in means if b == behavior)
            rows += [(behavior, s, *(_cell(means.get((behavior, s, m))) for m in methods), "") for s in stages]
            if any(b == behavior for b, _ in left):
                rows.append((behavior, "(interaction)", *(left.get((behavior, method), "") for method in methods), ""))
        return aligned(("behavior", "stage", *methods, ""), rows, self.caveats)


def _cell(mean: Effect | None) -> str:
    if mean is None:
        return ""
    bar = f" ± {mean.error_bar:.2f}" if mean.error_bar else ""
    return f"{mean.effect:+.2f}{bar}{'' if mean.reliable else ' not reliable'}"


def _mean(rows: Iterable[Effect]) -> Effect:
    rows = list(rows)
    effect = sum(r.effect for r in rows) / len(rows)
    bar = sum(r.error_bar for r in rows) / len(rows)
    first = rows[0]
    reliable = bar <= RELIABLE * abs(effect)
    label = f"{len(rows)}"
    return Effect(first.behavior, label, first.stage, first.method, first.read_out, effect, bar, reliable, first.cost)
