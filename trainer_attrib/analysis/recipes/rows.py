"""Recipes that compare sketched rows, those captured during training above all: one stream over the rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol, runtime_checkable

import numpy as np
import pyarrow as pa
from torch import Tensor

from trainer_attrib.analysis.influence_results import InfluenceExamples
from trainer_attrib.analysis.query_sketches import kept_columns, missing_weights
from trainer_attrib.analysis.recipes.recipe import Question, Sketches, StageScores
from trainer_attrib.analysis.recipes.streamed import Comparable, Part, Rows, StreamedStage, places_of
from trainer_attrib.analysis.retrieval.ends import Ends, together
from trainer_attrib.analysis.retrieval.faiss_candidates import Faiss
from trainer_attrib.analysis.retrieval.groups import StageSums
from trainer_attrib.analysis.retrieval.part_scores import PartSums, TopK, top_k
from trainer_attrib.analysis.retrieval.plan import Plan
from trainer_attrib.analysis.retrieval.sources import ByName, FirstSeen, Numbered, Sources, joined
from trainer_attrib.analysis.retrieval.visits import (
    AllScores,
    Found,
    PartVisits,
    Scores,
    SingleScores,
    numbered,
    part_sums,
    part_visits,
    single_visits,
)
from trainer_attrib.errors import ConfigurationError
from trainer_attrib.execution.runner import Runner
from trainer_attrib.ledger.reader import StageReader
from trainer_attrib.ledger.schema import EXAMPLES, ROWS

Score = Callable[[Rows], Tensor]
"""Rows [N] -> scores [Q, N]."""

Counted = Callable[[pa.Table], tuple[PartVisits, np.ndarray]]
"""Rows -> the examples that they are of, and which of them each row is of."""

Exact = Callable[[Question, Score, int], Found]
"""Scans the rows of a question by a function that gives scores of so many queries."""


class RowRecipe(Protocol):
    """What a recipe over rows says of itself."""

    @property
    def scale_free(self) -> bool:
        """Whether raw rows, from before the stage's first second moments, can be compared with the others."""
        ...

    @property
    def sums_visits(self) -> bool:
        """Whether an example's score is the sum over its visits in training, not their mean."""
        ...

    def prepare(self, stage: StreamedStage, sketch: Callable[[int], Tensor]) -> Score:
        """Look at the stage, and make the function that scores its rows.

        Args:
            stage: its rows may be streamed as often as is needed.
            sketch: second-moment version -> sketches of all queries in its scaling, [Q, K].
        """
        ...


@runtime_checkable
class Proposing(Protocol):
    """A :data:`Score` that an approximate index can stand in for."""

    def near(
        self, recipe: RowRecipe, question: Question, stage: StreamedStage, finder: Faiss, exact: Exact
    ) -> tuple[Found, list[str]]:
        """Both ends of the exact ranking of what the index proposes, and what is to be said of it."""
        ...


def score_rows(recipe: RowRecipe, question: Question) -> list[StageScores]:
    """Scores of the examples of every stage of the question.

    Rows of each second-moment version are compared with the query sketched in that version's scaling. Rows from before
    a stage's first version are raw: a cosine does not mind, so they are used and the caveats say so; where two scales
    would be mixed they are left out, and the caveats say so.
    """
    return [_score_stage(recipe, question, stage) for stage in question.stages]


def _score_stage(recipe: RowRecipe, question: Question, reader: StageReader) -> StageScores:
    model = question.lineage.model
    stage = StreamedStage(reader, kept_columns(model, reader), recipe.scale_free, question.lineage.runner)
    sketches = Sketches(question, reader)
    sums, score, proposed = StageSums(reader.name), recipe.prepare(stage, sketches), list[str]()
    if question.lineage.runner.workers > 1:
        sketches.complete()  # together, and not by each process when it first needs one
    if question.candidates is None:
        found = _collect(recipe, question, stage, score, question.queries, sums)
    else:

        def exact(part: Question, score: Score, queries: int) -> Found:
            return _collect(recipe, part, stage, score, queries, StageSums(reader.name))

        if not isinstance(score, Proposing):
            raise ConfigurationError(
                f"Recipe '{getattr(recipe, 'name', recipe)}' has no candidates: its score is not the product of one "
                "fixed vector per row with one vector per query.",
                fix="leave out `candidates`, or use trackstar, fisher, grad_cos or grad_dot.",
            )
        found, proposed = score.near(recipe, question, stage, question.candidates, exact)
    caveats = (*_streamed(stage), *proposed, *_caveats(question, reader))
    examples = _examples_of(reader, found, question.lineage.runner)
    return StageScores(examples, found.scores, caveats, found.places, sums)


def _collect(
    recipe: RowRecipe, question: Question, stage: StreamedStage, score: Score, queries: int, sums: StageSums
) -> Found:
    """All scores, or both ends of them; row by row they are added to the sums."""
    if question.keep is None:
        every: Scores = SingleScores(queries)
        asked = ScorePart(score, queries, FirstSeen(stage.reader, EXAMPLES.names), single_visits)
        if not stage.reader.visited_once(stage.parts):
            every = AllScores(queries, sums=recipe.sums_visits)
            asked = ScorePart(score, queries, ByName(stage.reader.sources()), part_visits)
        for found in stage.map(asked, "scoring", question.where):
            every.add(found.visits, found.sums)
            sums.merge(found.groups)
        return every.found()
    plan, sources, visits = _planned(question, stage)
    kept = []
    for number, group in enumerate(plan.groups(queries)):
        ends = Ends(plan, len(range(queries)[group]), question.keep, sums=recipe.sums_visits)
        whole = ScorePart(score, queries, sources, visits)
        asked = BestOfPart(whole, plan, group, question.keep, recipe.sums_visits, number == 0)
        for best in stage.map(asked, "scoring", question.where):
            ends.add(best)
            if best.groups is not None:
                sums.merge(best.groups)
        kept.append(ends.found())
    return together(kept)


def _planned(question: Question, stage: StreamedStage) -> tuple[Plan, Sources, Counted]:
    """Which examples are in several parts, and the sources of all. Where no example can be, nothing is read."""
    if stage.reader.visited_once(stage.parts):
        return Plan.nothing_open(), FirstSeen(stage.reader), single_visits
    parts = list(stage.map(count_part, "counting", question.where))
    ids, at = numbered([part.ids for part in parts])
    numbers = np.split(at, np.cumsum([len(part.ids) for part in parts])[:-1]) if parts else []
    coded = joined(ids, stage.reader.examples(("example", "source")))
    return Plan.of(parts, numbers), Numbered(coded, numbers), part_visits


def count_part(_: Comparable, parts: Sequence[Part], __: int) -> PartVisits:
    """Which examples are in a part."""
    return part_visits(_together([part.table for part in parts]))[0]


@dataclass(frozen=True)
class ScorePart:
    """Scores the rows of a part.

    Args:
        score: rows [N] -> scores [Q, N].
        queries: Q.
        sources: of the examples of each part.
        visits: finds the examples of rows.
    """

    score: Score
    queries: int
    sources: Sources
    visits: Counted

    def __call__(self, rows: Comparable, parts: Sequence[Part], number: int) -> PartSums:
        """Sums over each example's rows, and over groups of rows."""
        table = _together([part.table for part in parts])
        found = [self.score(chunk).numpy() for part in parts for chunk in part.rows()]
        scores_QN = np.concatenate([np.zeros((self.queries, 0), np.float32), *found], axis=1)
        visits, at = self.visits(table)
        (names, codes), visits = self.sources.of(number, places_of(parts), visits)
        groups = StageSums(rows.reader.name)
        groups.add(names, codes[at], table["step"].to_numpy(), scores_QN)
        return PartSums(visits, part_sums(at, len(visits.ids), scores_QN), groups)


@dataclass(frozen=True)
class BestOfPart:
    """What of a part's scores can still be among the best; see :func:`top_k`.

    Args:
        score: of its rows.
        plan: of all parts.
        queries: that are asked about.
        keep: so many scores at either end.
        sums: an example's score is the sum over its rows, not their mean.
        groups: whether sums over groups of rows are wanted.
    """

    score: ScorePart
    plan: Plan
    queries: slice
    keep: int
    sums: bool
    groups: bool

    def __call__(self, rows: Comparable, parts: Sequence[Part], number: int) -> TopK:
        """The answer of one part."""
        found = self.score(rows, parts, number)
        return top_k(found, self.plan, number, self.queries, self.keep, sums=self.sums, groups=self.groups)


def _together(tables: Sequence[pa.Table]) -> pa.Table:
    return pa.concat_tables(tables) if tables else ROWS.empty_table()


def _examples_of(stage: StageReader, found: Found, runner: Runner) -> InfluenceExamples:
    sources, texts = _told(stage, found, runner)
    stages, ids = np.full(len(found.ids), stage.name, object), np.array(found.ids, object)
    return InfluenceExamples(stages, ids, found.last_steps, sources, texts)


def _told(stage: StageReader, found: Found, runner: Runner) -> tuple[list[str | None], list[str | None]]:
    """Sources and texts of examples."""
    if found.told is not None:
        return found.told["source"].to_pylist(), found.told["text"].to_pylist()
    parts = runner.once(stage.example_parts)  # more may be sealed while several processes look
    wanted = None if found.places is None else frozenset(found.ids)
    told = dict[str, tuple[str | None, str | None]]()
    for table in runner.map(partial(stage.examples_of, wanted), parts):
        columns = (table[name].to_pylist() for name in EXAMPLES.names)
        for example, source, text in zip(*columns, strict=True):
            told.setdefault(example, (source, text))
    both = [told.get(example, (None, None)) for example in found.ids]
    return [source for source, _ in both], [text for _, text in both]


def _streamed(stage: StreamedStage) -> list[str]:
    name = stage.reader.name
    said = [f"stage '{name}': {n} rows left out: {why}" for why, n in stage.tally.left_out.items()]
    if stage.tally.raw:
        said.append(f"stage '{name}': {stage.tally.raw} rows are raw (no second moments yet) and were scored as such")
    return said


def _caveats(question: Question, stage: StageReader) -> list[str]:
    said = []
    if gone := missing_weights(question.lineage.model, stage):
        said.append(f"stage '{stage.name}': {len(gone)} weights that the model no longer has are left out")
    coverage = stage.meta["coverage"] or {}
    sample, every = (stage.meta["sketch"].get(budget, 1) for budget in ("sample", "every_n_steps"))
    if sample < 1:
        said.append(f"stage '{stage.name}': rows of {100 * sample:g} % of the examples, the others have no score")
    if every > 1:
        said.append(f"stage '{stage.name}': rows of one step in {every}, what examples did in the others is not known")
    if left_out := _steps_left_out(stage):
        said.append(f"stage '{stage.name}': the rows of {left_out} steps were left out because the disk was too slow")
    if coverage.get("share", 1.0) < 0.9:
        said.append(f"stage '{stage.name}': rows cover {coverage['share']:.0%} of the trainable parameters")
    if stage.meta["correction_unavailable"]:
        said.append(f"stage '{stage.name}': {stage.meta['correction_unavailable']}")
    if stage.meta["status"] != "complete":
        reason = stage.meta["reason"] or "still running, or ended by a signal"
        said.append(f"stage '{stage.name}' is {stage.meta['status']}: {reason}")
    return said


def _steps_left_out(stage: StageReader) -> int:
    """Steps that trained, and of which no rows were recorded although they should have been."""
    if stage.meta["sketch"].get("when_behind", "wait") == "wait":
        return 0
    steps = stage.steps().select(["captured", "micro_batches"]).to_pylist()
    return sum(bool(step["micro_batches"]) and not step["captured"] for step in steps)
