"""Self-influence: how much training on an example changed that example, as wrong labels and oddities do most."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from trainer_attrib.analysis.effects.lineage import Lineage
from trainer_attrib.analysis.examples import Examples
from trainer_attrib.analysis.own_losses import OwnLossMetric, leave_one_out, own_losses, self_gauss_newton
from trainer_attrib.analysis.recipes.streamed import Rows, StreamedStage
from trainer_attrib.analysis.recipes.trackstar import training_moments
from trainer_attrib.analysis.results import Result
from trainer_attrib.analysis.tables import aligned, in_figure, require_matplotlib, shortened
from trainer_attrib.errors import ConfigurationError
from trainer_attrib.execution.runner import Runner, Serial
from trainer_attrib.ledger.reader import StageReader
from trainer_attrib.numerics.row_curvature import damped_inverse, whiten
from trainer_attrib.report.blocks import Bar, Bars, Block, Grid, Notes
from trainer_attrib.tap.plan import SketchPlan

METRICS, DAMPING, SHOWN = ("fisher", "plain"), 0.1, 20
GIVEN = {metric.name: metric for metric in (self_gauss_newton(), leave_one_out())}
ODD = "a large self-influence is an odd example, not necessarily a wrong one: look at its loss too"
BASELINE = "the loss beside it costs one forward pass and finds nearly as many wrong labels (docs/influence.md)"


@dataclass(frozen=True)
class SelfScore:
    """One example.

    Args:
        rank: from 1.
        example: its id.
        score: mean over its visits, or over recorded states of the model, of what the metric says.
        visits: how many of these.
        source: where it comes from.
        text: how it is shown.
        loss: that the model has of it, where the examples were given.
    """

    rank: int
    example: str
    score: float
    visits: int
    source: str | None
    text: str | None
    loss: float | None = None


@dataclass(frozen=True, repr=False)
class SelfInfluence(Result):
    """All captured or given examples of a stage, largest self-influence first; ties by id."""

    stage: str
    metric: str
    rows: tuple[SelfScore, ...]
    caveats: tuple[str, ...] = ()

    def top(self, k: int = 10) -> list[SelfScore]:
        """The first ones."""
        return list(self.rows[:k])

    def to_table(self) -> pa.Table:
        """Columns rank, example, score, visits, source, text, loss."""
        return pa.Table.from_pylist([asdict(row) for row in self.rows])

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        told = {"stage": self.stage, "metric": self.metric, "rows": [asdict(row) for row in self.rows]}
        return told | {"caveats": list(self.caveats)}

    def blocks(self) -> list[Block]:
        """The first ones as bars and as a table, the caveats."""
        first = self.top(SHOWN)
        bars = [Bar(shortened(row.text or row.example, 40), self.metric, row.score) for row in first]
        columns = ("rank", "example", "score", "visits", "source", "text")
        columns += () if all(row.loss is None for row in first) else ("loss",)
        return [
            Bars(f"Self-influence in stage {self.stage}", bars, note="Large: wrong labels, oddities, hard examples."),
            Grid("Examples", columns, [tuple(getattr(row, name) for name in columns) for row in first]),
            Notes("What to keep in mind", self.caveats),
        ]

    def plot(self) -> Any:
        """A matplotlib figure of all scores in order. Needs the extra ``plot``."""
        figure, axis = require_matplotlib().subplots(figsize=(7, 3), layout="tight")
        axis.semilogy(range(1, len(self.rows) + 1), [max(row.score, 1e-30) for row in self.rows])
        title = in_figure(f"Stage {self.stage}")
        axis.set(xlabel="rank", ylabel=f"self-influence ({self.metric})", title=title)
        return figure

    def __repr__(self) -> str:
        cells = [(f"{r.rank}", f"{r.score:.4g}", r.source or "", r.text or r.example) for r in self.top(SHOWN)]
        return aligned(("", "score", "source", f"stage {self.stage}"), cells, self.caveats)


def self_influence(stage: StageReader, metric: str, runner: Runner | None = None) -> SelfInfluence:
    """Mean over an example's captured rows g of g^T (R + damping)^(-1) g, R being the second moments of all rows, layer
    by layer ("fisher"; Koh & Liang 2017, section 5.4, with that Fisher for the Hessian), or of |g|^2 ("plain"; Pruthi
    et al. 2020, equation 1, without learning rates).

    Raises:
        ConfigurationError: another metric, or a stage without comparable rows.
    """
    if metric not in METRICS:
        known = [*METRICS, *GIVEN]
        raise ConfigurationError(f"Unknown metric {metric!r}.", fix=f"use one of {known}.")
    streamed = StreamedStage(stage, torch.ones(stage.width), metric == "plain", runner or Serial())
    spans = SketchPlan.from_dict(stage.meta["plan"]).row_spans
    inverses = [damped_inverse(m, DAMPING) for m in training_moments(streamed, spans)[0].means()]

    def squared(rows: Rows) -> Tensor:
        own_N = rows.norms.square()
        return own_N * (whiten(rows.unit, spans, inverses) * rows.unit).sum(1) if metric == "fisher" else own_N

    totals: dict[str, list[float]] = {}
    for table, rows in streamed.stream("self-influence of"):
        for name, value in zip(table["example"].to_pylist(), squared(rows).double().tolist(), strict=True):
            totals.setdefault(name, []).append(value)
    if not totals:
        raise ConfigurationError(
            f"Stage '{stage.name}' has no comparable rows.", fix="record it with sketches, or choose another stage."
        )
    described = {row["example"]: row for row in stage.examples().to_pylist()}
    scores = [
        SelfScore(0, name, float(np.mean(found)), len(found),
                  described.get(name, {}).get("source"), described.get(name, {}).get("text"))
        for name, found in totals.items()
    ]  # fmt: skip
    caveats = [ODD]
    caveats += [f"{count} rows are left out: {reason}" for reason, count in streamed.tally.left_out.items()]
    return SelfInfluence(stage.name, metric, _ranked(scores), tuple(caveats))


def given_self_influence(
    lineage: Lineage, stage: StageReader, examples: Examples, metric: OwnLossMetric
) -> SelfInfluence:
    """Scores of given examples, all that a stage trained on, by the curvature of their losses.

    Raises:
        StageNotFoundError: no snapshot of that name.
    """
    found = own_losses(lineage, stage, examples, metric.curvature)
    scores = [
        SelfScore(0, name, score, found.states, examples.sources[at], examples.texts[at], float(found.loss[at]))
        for at, (name, score) in enumerate(zip(examples.ids, metric.of(found).tolist(), strict=True))
    ]
    return SelfInfluence(stage.name, metric.name, _ranked(scores), (ODD, BASELINE, *found.caveats))


def _ranked(scores: Sequence[SelfScore]) -> tuple[SelfScore, ...]:
    """Largest first, ties by id."""
    order = sorted(scores, key=lambda score: (-score.score, score.example))
    return tuple(replace(score, rank=place) for place, score in enumerate(order, 1))
