"""Do the top examples really move the behavior? One optimizer step on each of them, beside two other rankings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from torch import nn

from trainer_attrib.analysis.behavior import Behavior
from trainer_attrib.analysis.controls import BM25
from trainer_attrib.analysis.examples import Examples
from trainer_attrib.analysis.influence_results import Influence
from trainer_attrib.analysis.results import Result
from trainer_attrib.analysis.tables import aligned, bars_of, require_matplotlib
from trainer_attrib.errors import ConfigurationError, MissingDataError, MissingExtraError
from trainer_attrib.evaluation.lexical import bm25_scores
from trainer_attrib.evaluation.tail_patch import PatchStep, TailPatch, tail_patch
from trainer_attrib.ledger.reader import StageReader
from trainer_attrib.report.blocks import Bar, Bars, Block, Grid, Notes
from trainer_attrib.tap.names import parameters_by_name


@dataclass(frozen=True, repr=False)
class Check(Result):
    """What one step on the top examples did to each behavior, for each ranking (Chang et al. 2024, "TrackStar":
    tail-patch).

    Attributes:
        recipe: whose scores were checked.
        k: examples per query.
        patches: (behavior, stage) -> the measured changes.
    """

    recipe: str
    k: int
    patches: Mapping[tuple[str, str], TailPatch]
    caveats: tuple[str, ...] = ()

    def to_table(self) -> pa.Table:
        """Columns behavior, stage, ranking, change, standard_error, beyond_random, beyond_random_error, together,
        together_error, unit: means over the top k and the queries, of one step on each example alone, and on all k."""
        return pa.Table.from_pylist(self._rows())

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {"recipe": self.recipe, "k": self.k, "rows": self._rows(), "caveats": list(self.caveats)}

    def blocks(self) -> list[Block]:
        """Bars of every ranking, the table, the caveats."""
        rows = self._rows()
        bars = [
            Bar(f"{r['behavior']}, {r['stage']}", r["ranking"], r["change"], _known(r["standard_error"])) for r in rows
        ]
        note = f"Mean change of the behavior by one optimizer step on one of the top {self.k} examples of a query."
        columns = ("behavior", "stage", "ranking", "change", "standard error", "beyond random", "standard error",
                   f"all {self.k} in one step", "standard error")  # fmt: skip
        shown = [tuple(row.values())[:-1] for row in rows]
        units = ", ".join(dict.fromkeys(r["unit"] for r in rows if r["unit"]))
        title = "Do the top examples move the behavior?"
        return [
            Bars(title, bars, units, note),
            Grid("Tail-patch", columns, shown),
            Notes("About the check", self.caveats),
        ]

    def plot(self) -> Any:
        """A matplotlib figure: change by one step, for each ranking, with standard errors. Needs the extra ``plot``."""
        rows = self._rows()[::-1]
        figure, axis = require_matplotlib().subplots(figsize=(7, 1 + 0.3 * len(rows)), layout="tight")
        labels = [f"{r['behavior']}, {r['stage']}: {r['ranking']}" for r in rows]
        bars_of(axis, labels, [r["change"] for r in rows], [_known(r["standard_error"]) for r in rows])
        axis.set_xlabel(f"change by one step on one of the top {self.k}")
        return figure

    def __repr__(self) -> str:
        columns = ("behavior", "stage", "ranking", f"one of top {self.k}", "beyond random", f"all {self.k} in one step")
        cells = [
            (r["behavior"], r["stage"], r["ranking"], _figure(r["change"], r["standard_error"]),
             _figure(r["beyond_random"], r["beyond_random_error"]), _figure(r["together"], r["together_error"]))
            for r in self._rows()
        ]  # fmt: skip
        return aligned(columns, cells, self.caveats)

    def _rows(self) -> list[dict[str, Any]]:
        rows = []
        for (behavior, stage), patch in self.patches.items():
            for ranking in patch.alone:
                alone, beyond, together = patch.score(ranking), patch.beyond(ranking), patch.score_together(ranking)
                row: dict[str, Any] = {"behavior": behavior, "stage": stage, "ranking": ranking}
                figures = {"change": alone, "beyond_random": beyond, "together": together}
                for (name, figure), error in zip(
                    figures.items(), ("standard_error", "beyond_random_error", "together_error"), strict=True
                ):
                    row |= {name: figure.value, error: figure.standard_error}
                rows.append(row | {"unit": patch.unit})
        return rows


def check(
    model: nn.Module,
    stages: Sequence[StageReader],
    influence: Influence,
    behaviors: Sequence[Behavior],
    data: Mapping[str, Examples],
    k: int,
) -> Check:
    """See :meth:`trainer_attrib.analysis.analyzer.Analyzer.check`."""
    _check_asked(influence, behaviors)
    patches, caveats = {}, list[str]()
    for stage in stages:
        scores_QN, examples = _given(influence, stage.name, data[stage.name])
        step, said = training_step(model, stage)
        caveats += said
        first = 0
        for behavior in behaviors:
            rankings = {influence.recipe: scores_QN[first : first + len(behavior)]}
            try:
                rankings |= _lexical(behavior, examples)
            except MissingExtraError as missing:
                caveats.append(f"no {BM25} beside: {missing.what}")
            patches[behavior.name, stage.name] = tail_patch(model, behavior, examples, rankings, step, k=k)
            first += len(behavior)
    caveats.append("each step starts from the final weights and stands for what training on the example would do now")
    return Check(influence.recipe, k, patches, tuple(dict.fromkeys(caveats)))


def training_step(model: nn.Module, stage: StageReader) -> tuple[PatchStep, list[str]]:
    """One optimizer step as the stage took them on average, without momentum: its mean learning rate and, where they
    were recorded, the second moments at its end; and what to know about it."""
    rates = [np.mean(row["learning_rate"]) for row in stage.steps().select(["learning_rate"]).to_pylist()]
    rate, moments = float(np.mean(rates)), stage.moments("end")
    name = f"stage '{stage.name}'"
    if not moments:
        return PatchStep(learning_rate=rate), [f"{name}: plain SGD steps of {rate:.2g}, no second moments recorded"]
    trained = {n: rate for n, p in parameters_by_name(model).items() if p.requires_grad and n in moments}
    said = [f"{name}: Adam steps of its mean learning rate, {rate:.2g}, with the second moments of its end"]
    return PatchStep(learning_rate=trained, second_moments=moments), said


def _given(influence: Influence, stage: str, examples: Examples) -> tuple[np.ndarray, Examples]:
    """Scores [Q, n] of those given examples that were scored, and these."""
    places = {str(i): n for n, i in enumerate(influence.examples.ids) if influence.examples.stages[n] == stage}
    known = [n for n, name in enumerate(examples.ids) if name in places]
    if not known:
        raise MissingDataError(
            f"None of the {len(examples)} given examples of stage '{stage}' has a score; ids look like "
            f"{examples.ids[:2]}, those of scored examples like {list(places)[:2]}.",
            fix="pass the examples that were trained on, with the ids that they were recorded by.",
        )
    return influence.scores[:, [places[examples.ids[n]] for n in known]], examples.some(known)


def _lexical(behavior: Behavior, examples: Examples) -> dict[str, np.ndarray]:
    texts = [text or "" for text in examples.texts]
    return {BM25: bm25_scores(behavior.queries, texts)} if any(texts) else {}


def _check_asked(influence: Influence, behaviors: Sequence[Behavior]) -> None:
    given = tuple((b.name, q) for b in behaviors for q in b.queries)
    asked = tuple(zip(influence.behaviors, influence.queries, strict=True))
    if given != asked:
        raise ConfigurationError(
            f"The influence answers {len(asked)} queries of {sorted(set(influence.behaviors))}, given are {len(given)} "
            f"of {[b.name for b in behaviors]}.",
            fix="pass the behaviors that were passed to `analyzer.influence`, in their order.",
        )


def _figure(value: float, error: float) -> str:
    return f"{value:+.3g} ± {error:.2g}"


def _known(error: float) -> float:
    return error if np.isfinite(error) else 0.0
