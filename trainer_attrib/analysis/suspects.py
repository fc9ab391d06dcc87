"""Suspects: the training examples that most likely taught a model an error, and the data set without them."""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from trainer_attrib.analysis.cleaning import Rows
from trainer_attrib.analysis.examples import Examples
from trainer_attrib.analysis.influence_results import Influence, InfluenceExamples
from trainer_attrib.analysis.matching import recorded_of
from trainer_attrib.analysis.recipes.dda import Dda
from trainer_attrib.analysis.recipes.products import GradCos
from trainer_attrib.analysis.results import Result
from trainer_attrib.analysis.tables import aligned, in_figure, require_matplotlib, shortened
from trainer_attrib.errors import ConfigurationError, MissingDataError
from trainer_attrib.ledger.reader import StageReader
from trainer_attrib.numerics.outliers import NORMAL_MAD, robust_z
from trainer_attrib.numerics.scores import denoised, rank, standardized
from trainer_attrib.report.blocks import Bar, Bars, Block, Grid, Notes

DEFAULT_RECIPE = Dda(GradCos(), beta=0.0)
"""Denoised over the recorded states; debiasing only helps where canaries say so."""
CUT, AT_MOST = 4.0, 0.05
"""Robust z from which on an example is a suspect, and the largest share of the examples that are, if nobody says how
many there are."""


@dataclass(frozen=True)
class Suspect:
    """An example that may have taught the error.

    ``score`` is the mean over the queries of scores standardised over the examples, ``robust_z`` how far it is from the
    median score, ``share`` the part of the queries that have it among their first as many as there are suspects.
    ``step`` is the last one that trained on it, 0 where unknown.
    """

    rank: int
    stage: str
    example: str
    score: float
    robust_z: float
    share: float
    step: int
    source: str | None
    text: str | None
    reason: str


@dataclass(frozen=True, repr=False)
class Suspects(Result):
    """The examples that most increased an error, first ones first. Whether they are wrong, only a look at them tells.

    ``scores`` is float64 [N], one for each of ``examples``, nan where unknown; ``cut`` says why the list ends where it
    ends.
    """

    rows: tuple[Suspect, ...]
    scores: np.ndarray
    examples: InfluenceExamples
    behaviors: tuple[str, ...]
    queries: tuple[str, ...]
    recipe: str
    cut: str
    caveats: tuple[str, ...] = ()

    def shown(self) -> dict[str, Any]:
        """Blocks, and what the command line says."""
        return {**super().shown(), "told": {"dict": self.to_dict(), "text": repr(self)}}

    @staticmethod
    def of(influence: Influence, k: int | None = None) -> Suspects:
        """The suspects of an influence on behaviors that *increase* with the error: the log-probability of the wrong
        text, or of the wrong minus that of the right one.

        Args:
            influence: with the scores of all examples.
            k: how many; None: those with a robust z above 4, at least one and at most 5 % of the examples.

        Raises:
            ConfigurationError: ``k`` is not between 1 and the number of scored examples, only the ends of the rankings
                were kept, or no score is finite.
        """
        if influence.places is not None:
            raise ConfigurationError(
                "Suspects need the scores of all examples; these are the ends of the rankings.",
                cause="scores are standardised over the examples, query by query.",
                fix="call analyzer.influence without `keep`.",
            )
        ids = influence.examples.ids.astype(str)
        scores_QN = np.where(np.isfinite(influence.scores), influence.scores, np.nan)
        scores_N = denoised(standardized(scores_QN)[:, None])[0]  # the mean over what scores an example: here, queries
        z_N = robust_z(scores_N)
        count, cut = _cut(z_N, k)
        shares_N = np.zeros(len(ids))
        for row in scores_QN:
            shares_N[rank(row, ids, count, largest=True)] += 1 / len(scores_QN)
        order = rank(scores_N, ids, count, largest=True)
        known = int((~np.isnan(scores_N)).sum())
        rows = [
            _suspect(
                influence, int(at), place + 1, float(scores_N[at]), float(z_N[at]), float(shares_N[at]), (known, count)
            )
            for place, at in enumerate(order)
        ]
        return Suspects(
            tuple(rows), scores_N, influence.examples, influence.behaviors, influence.queries, influence.recipe, cut,
            (cut, "suspects are what increased the error most: read them before they are dropped", *influence.caveats),
        )  # fmt: skip

    def located(self, stages: Sequence[StageReader]) -> Suspects:
        """The same with steps, sources and texts that the stages' ledgers know and the scores do not tell."""
        rows = list(self.rows)
        for stage in stages:
            own = [at for at, row in enumerate(rows) if row.stage == stage.name]
            known = recorded_of(stage, [rows[at].example for at in own], [rows[at].text for at in own]) if own else []
            for at, found in zip(own, known, strict=True):
                if found is not None:
                    row = rows[at]
                    rows[at] = replace(
                        row, step=row.step or found.step, source=row.source or found.source, text=row.text or found.text
                    )
        return replace(self, rows=tuple(rows))

    def told_by(self, data: Mapping[str, Examples]) -> Suspects:
        """The same with sources and texts of given examples, by name of the stage, that nobody told so far."""
        rows = []
        for row in self.rows:
            given = data.get(row.stage)
            if given is not None and row.example in given.ids:
                at = given.ids.index(row.example)
                row = replace(row, source=row.source or given.sources[at], text=row.text or given.texts[at])
            rows.append(row)
        return replace(self, rows=tuple(rows))

    def __len__(self) -> int:
        return len(self.rows)

    def to_table(self) -> pa.Table:
        """Columns rank, stage, example, score, robust_z, share, step, source, text, reason."""
        return pa.Table.from_pylist([asdict(row) for row in self.rows])

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: the suspects, not the scores of the others."""
        return {
            "recipe": self.recipe,
            "queries": list(self.queries),
            "examples": len(self.examples),
            "suspects": [asdict(row) for row in self.rows],
            "caveats": list(self.caveats),
        }

    def of_stage(self, stage: str) -> list[Suspect]:
        """Those of one stage."""
        return [row for row in self.rows if row.stage == stage]

    def keep(self, dataset: Any, id_column: str = "id", *, stage: str | None = None) -> Any:
        """The data set without the suspects.

        Args:
            dataset: of Hugging Face ``datasets``, or a list of dicts.
            id_column: that has the ids by which examples were recorded or given; a row without it is called by its
                number. Where ids do not match, texts must (``text``, or ``prompt`` and ``completion``); then all rows
                with the text of a suspect go.
            stage: that was trained on this data set; it need not be named where all suspects are of one.

        Returns:
            ``dataset.select(...)``, or a list.

        Raises:
            MissingDataError: a suspect is not in the data set.
            ConfigurationError: suspects are of several stages, or no row would be left.
        """
        return Rows(dataset, id_column).without(self.dropped(dataset, id_column, stage=stage))

    def dropped(self, dataset: Any, id_column: str = "id", *, stage: str | None = None) -> dict[int, Suspect]:
        """Which rows of a data set are suspects: number of the row -> suspect. See :meth:`keep`."""
        suspects = self._of_one(stage)
        found = Rows(dataset, id_column).places([s.example for s in suspects], [s.text for s in suspects])
        return {place: suspect for suspect, places in zip(suspects, found, strict=True) for place in places}

    def write_cleaned(
        self, folder: str | os.PathLike[str], dataset: Any, id_column: str = "id", *, stage: str | None = None
    ) -> Path:
        """Write the data set without the suspects as ``datasets.load_from_disk`` reads it, and in the same folder
        ``dropped.jsonl``: id, reason, score and text of each row that was left out. Returns the folder, which is there
        as a whole or not at all.

        Args:
            folder: new.
            dataset: see :meth:`keep`.
            id_column: see :meth:`keep`.
            stage: see :meth:`keep`.

        Raises:
            ConfigurationError: the folder exists or cannot be written, rows cannot be stored, or see :meth:`keep`.
            MissingDataError: a suspect is not in the data set.
            MissingExtraError: the package ``datasets`` is not installed.
        """
        write = importlib.import_module("trainer_attrib.integrations.cleaned_data").write_cleaned
        rows, dropped = Rows(dataset, id_column), self.dropped(dataset, id_column, stage=stage)
        ids, texts = rows.ids, rows.texts
        told = [
            {"id": ids[place], "reason": suspect.reason, "score": suspect.score, "text": texts[place] or suspect.text}
            for place, suspect in sorted(dropped.items())
        ]
        return write(folder, rows.without(dropped), told)

    def blocks(self) -> list[Block]:
        """The scores of the suspects, who they are, the caveats."""
        bars = [Bar(f"{row.rank}. {shortened(_shown(row), 40)}", self.recipe, row.score) for row in self.rows[:30]]
        note = "Mean over the queries of scores standardised over all examples. Positive: training on the example "
        note += f"increased the error. {self._asked()}"
        columns = ("rank", "stage", "example", "score", "robust z", "share of queries", "step", "source", "text", "why")
        rows = [
            (r.rank, r.stage, r.example, r.score, r.robust_z, r.share, r.step, r.source, r.text, r.reason)
            for r in self.rows
        ]
        return [
            Bars("Suspects", bars, "standard deviations", note),
            Grid("Who they are", columns, rows),
            Notes("What to keep in mind", self.caveats),
        ]

    def plot(self) -> Any:
        """A matplotlib figure: the scores of all examples in order, suspects marked. Needs the extra ``plot``."""
        figure, axis = require_matplotlib().subplots(figsize=(7, 3), layout="tight")
        scores = np.sort(self.scores[~np.isnan(self.scores)])[::-1]
        axis.plot(np.arange(1, len(scores) + 1), scores, linewidth=1)
        axis.plot([row.rank for row in self.rows], [row.score for row in self.rows], "o", label="suspects")
        axis.axhline(0, color="black", linewidth=0.8)
        axis.set(xlabel="rank", ylabel=in_figure(f"{self.recipe}, standardised"), title="Scores of all examples")
        axis.legend()
        return figure

    def __repr__(self) -> str:
        columns = ("", "score", "queries", "stage", "step", "source", "text")
        cells = [
            (f"{r.rank}", f"{r.score:+.2f}", f"{r.share:.0%}", r.stage, f"{r.step or ''}", r.source or "", _shown(r))
            for r in self.rows
        ]
        return "\n".join([self._asked(), aligned(columns, cells, self.caveats)])

    def _asked(self) -> str:
        first, *others = self.queries or ("",)
        more = f" and {len(others)} more" if others else ""
        return f"{len(self)} suspects of {len(self.examples):,} examples, recipe {self.recipe}, for: {first}{more}"

    def _of_one(self, stage: str | None) -> Sequence[Suspect]:
        stages = list(dict.fromkeys(row.stage for row in self.rows))
        if stage is None and len(stages) > 1:
            raise ConfigurationError(f"The suspects are of stages {stages}.", fix="say which one as `stage`.")
        if stage is not None and stage not in stages:
            raise MissingDataError(
                f"No suspect is of stage '{stage}'; they are of {stages}.", fix="choose among those."
            )
        return self.of_stage(stage or stages[0])


def _cut(z_N: np.ndarray, k: int | None) -> tuple[int, str]:
    """How many suspects there are, and why."""
    known = int((~np.isnan(z_N)).sum())
    if known == 0:
        raise ConfigurationError(
            f"None of {len(z_N)} examples has a finite score.", fix="choose another recipe, or look at its caveats."
        )
    if k is not None:
        if not 1 <= k <= known:
            raise ConfigurationError(f"k={k} suspects of {known} scored examples.", fix=f"ask for 1 to {known}.")
        return k, f"the first {k} of {known:,} examples, as asked: not each of them need be an error"
    above, limit = int((z_N > CUT).sum()), max(1, int(AT_MOST * known))
    rule = f"robust z above {CUT:g}: score minus median, over {NORMAL_MAD} median absolute deviations"
    if above == 0:
        return 1, f"no example stands out ({rule}; the highest is {np.nanmax(z_N):.1f}): the first one may be no error"
    if above > limit:
        return limit, f"{above} examples stand out ({rule}); the first {limit} are listed, {AT_MOST:.0%} of {known:,}"
    return above, f"{above} of {known:,} examples stand out ({rule})"


def _suspect(
    influence: Influence, at: int, place: int, score: float, z: float, share: float, counts: tuple[int, int]
) -> Suspect:
    examples, queries, (known, count) = influence.examples, len(influence.queries), counts
    over = "the query" if queries == 1 else f"the mean over {queries} queries"
    among = "" if queries == 1 else f"; among the first {count} of {share:.0%} of them"
    reason = f"rank {place} of {known:,} by {influence.recipe}: {score:+.2f} standard deviations for {over} "
    reason += f"(robust z {z:.1f}){among}"
    source, text = examples.sources[at], examples.texts[at]
    return Suspect(
        place,
        str(examples.stages[at]),
        str(examples.ids[at]),
        score,
        z,
        share,
        int(examples.steps[at]),
        source,
        text,
        reason,
    )


def _shown(row: Suspect) -> str:
    return row.text or row.example
