"""Recipes that compare sketched rows, those captured during training above all: one stream over the rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol, runtime_checkable

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from trainer_attrib.analysis.influence_results import InfluenceExamples
from trainer_attrib.analysis.query_sketches import kept_columns, missing_weights
from trainer_attrib.analysis.recipes.recipe import Question, StageScores
from trainer_attrib.analysis.retrieval.ends import Ends, Plan, together
from trainer_attrib.analysis.retrieval.faiss_candidates import Faiss
from trainer_attrib.analysis.retrieval.groups import StageSums
from trainer_attrib.analysis.retrieval.visits import AllScores, Found
from trainer_attrib.analysis.retrieval.where import Where
from trainer_attrib.errors import ConfigurationError
from trainer_attrib.ledger.reader import RowBlock, StageReader
from trainer_attrib.numerics.sketching import unit_rows
from trainer_attrib.progress import progress

CHUNK_BYTES = 4 << 20  # of float32 rows at a time: what a cache holds is multiplied before it leaves it


@dataclass(frozen=True)
class Rows:
    """Some rows of one second-moment version.

    Args:
        unit: unit-norm sketches [N, K], float32.
        norms: of the examples' loss gradients, [N].
        reach: how far a unit of each example's gradient moved the weights: learning rate over loss denominator, [N].
        version: of the second moments.
    """

    unit: Tensor
    norms: Tensor
    reach: Tensor
    version: int


Score = Callable[[Rows], Tensor]
"""Rows [N] -> scores [Q, N]."""

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


@dataclass
class StreamedStage:
    """The comparable rows of a stage."""

    reader: StageReader
    keep: Tensor  # 1 for the columns that are compared, [K]
    scale_free: bool
    left_out: dict[str, int] = field(default_factory=dict)
    raw: int = 0  # rows that are streamed although they are in a scaling of their own

    def stream(self, title: str, where: Where | None = None) -> Iterator[tuple[pa.Table, Rows]]:
        """Rows of one version, a few at a time, with their table."""
        for part in self.parts(title, where):
            at = 0
            for rows in part.rows():
                yield part.table.slice(at, len(rows.norms)), rows
                at += len(rows.norms)

    def parts(self, title: str, where: Where | None = None) -> Iterator[Part]:
        """The rows of one version in each part of the ledger, none of which is read yet."""
        self.left_out, self.raw = {}, 0
        rates, corrected = self.rates, bool(self.reader.meta["versions"])
        passes = None if where is None else where.of_stage(self.reader.sources)
        blocks = self.reader.rows()
        total = len(self.reader.row_parts())
        for block in progress(blocks, f"{title} {self.reader.name}", total):
            versions, complete = block.table["version"].to_numpy(), block.table["complete"].to_numpy()
            wanted = np.ones(len(versions), bool) if passes is None else passes(block.table)
            self._skip("some layers did not fire", int((wanted & ~complete).sum()))
            for version in np.unique(versions[wanted]):
                at = np.flatnonzero((versions == version) & complete & wanted)
                raw = corrected and version == 0
                if raw and not self.scale_free:
                    self._skip("raw rows from before the first second-moment version", len(at))
                elif len(at):
                    self.raw += raw * len(at)
                    yield Part(block, at, int(version), rates, self.keep)

    @cached_property
    def rates(self) -> np.ndarray:
        """Learning rates by step number."""
        return _rates(self.reader)

    @cached_property
    def described(self) -> pa.Table:
        """Source and text of the examples."""
        return self.reader.examples()

    def _skip(self, reason: str, rows: int) -> None:
        if rows:
            self.left_out[reason] = self.left_out.get(reason, 0) + rows


class Part:
    """Rows of one part of the ledger that have the same second-moment version.

    Args:
        block: that they are in.
        at: where in it.
        version: of the second moments.
        rates: learning rates by step number.
        keep: 1 for the columns that are compared, [K].
    """

    def __init__(self, block: RowBlock, at: np.ndarray, version: int, rates: np.ndarray, keep: Tensor) -> None:
        whole = len(at) == block.table.num_rows
        self.table = block.table if whole else block.table.take(at)
        self._sketches, self._at = block.sketches, None if whole else at
        self._version, self._keep = version, None if keep.all() else keep
        self._norms_N = torch.from_numpy(np.array(self.table["norm"].to_numpy(), dtype=np.float32))
        reach_N = rates[self.table["step"].to_numpy()] / self.table["denominator"].to_numpy()
        self._reach_N = torch.from_numpy(np.array(reach_N, np.float32))

    def rows(self) -> Iterator[Rows]:
        """Read the sketches, a few megabytes at a time: a whole part as float32 would go through memory twice.

        torch converts float16 with the processor's instructions for it, numpy value by value: 17 times slower.
        """
        step = max(64, CHUNK_BYTES // (4 * max(1, self._sketches.shape[1])))
        for first in range(0, len(self._norms_N), step):
            span = slice(first, first + step)
            chunk = self._sketches[span if self._at is None else self._at[span]]
            unit_NK, norms_N = torch.from_numpy(chunk).float(), self._norms_N[span]
            if self._keep is not None:
                unit_NK, kept_N = unit_rows(unit_NK * self._keep)
                norms_N = norms_N * kept_N
            yield Rows(unit_NK, norms_N, self._reach_N[span], self._version)


def _rates(stage: StageReader) -> np.ndarray:
    """Learning rate of every step, mean over the parameter groups, by step number; for SGD what momentum makes of it
    in the end."""
    steps = stage.steps().select(["step", "learning_rate", "beta1"]).to_pylist()
    sgd = any(optimizer["class"].endswith(".SGD") for optimizer in stage.meta["optimizers"])
    rates = np.zeros(1 + max((row["step"] for row in steps), default=0))
    for row in steps:
        momenta = row["beta1"] if sgd else [0.0] * len(row["learning_rate"])
        pairs = zip(row["learning_rate"], momenta, strict=True)
        rates[row["step"]] = np.mean([rate / (1 - min(momentum or 0.0, 0.999)) for rate, momentum in pairs])
    return rates


def _score_stage(recipe: RowRecipe, question: Question, reader: StageReader) -> StageScores:
    stage = StreamedStage(reader, kept_columns(question.lineage.model, reader), recipe.scale_free)
    sketched: dict[int, Tensor] = {}

    def sketch(version: int) -> Tensor:
        if version not in sketched:
            sketched[version] = question.sketches(reader, version)
        return sketched[version]

    sums, score, proposed = StageSums(reader.name), recipe.prepare(stage, sketch), list[str]()
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
    return StageScores(_examples_of(stage, found), found.scores, caveats, found.places, sums)


def _collect(
    recipe: RowRecipe, question: Question, stage: StreamedStage, score: Score, queries: int, sums: StageSums
) -> Found:
    """All scores, or both ends of them; row by row they are added to the sums."""
    sources = stage.reader.sources()

    def stream(collector: AllScores | Ends, group: slice, summing: bool) -> Found:
        for part in stage.parts("scoring", question.where):
            scores_QN = np.concatenate([score(rows).numpy() for rows in part.rows()], axis=1)
            collector.add(part.table, scores_QN[group])
            if summing:
                ids = part.table["example"].to_pylist()
                sums.add([sources.get(i) for i in ids], part.table["step"].to_numpy(), scores_QN)
        return collector.found()

    if question.keep is None:
        return stream(AllScores(queries, recipe.sums_visits), slice(None), True)
    plan = Plan()
    for part in stage.parts("counting", question.where):
        plan.add(part.table)
    groups = plan.groups(queries)
    ends = [
        stream(Ends(plan, len(range(queries)[group]), question.keep, recipe.sums_visits), group, n == 0)
        for n, group in enumerate(groups)
    ]
    return together(ends)


def _examples_of(stage: StreamedStage, found: Found) -> InfluenceExamples:
    wanted, told = set(found.ids), stage.described
    at = np.array([n for n, example in enumerate(told["example"].to_pylist()) if example in wanted], np.int64)
    told = told.take(at) if len(at) < told.num_rows else told
    place = {example: n for n, example in enumerate(told["example"].to_pylist())}
    sources, texts = (told[name].to_pylist() for name in ("source", "text"))
    places = [place.get(example) for example in found.ids]
    return InfluenceExamples(
        stages=np.array([stage.reader.name] * len(found.ids), dtype=object),
        ids=np.array(found.ids, dtype=object),
        steps=found.last_steps,
        sources=[None if at is None else sources[at] for at in places],
        texts=[None if at is None else texts[at] for at in places],
    )


def _streamed(stage: StreamedStage) -> list[str]:
    name = stage.reader.name
    said = [f"stage '{name}': {n} rows left out: {why}" for why, n in stage.left_out.items()]
    if stage.raw:
        said.append(f"stage '{name}': {stage.raw} rows are raw (no second moments yet) and were scored as such")
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
    if coverage.get("share", 1.0) < 0.9:
        said.append(f"stage '{stage.name}': rows cover {coverage['share']:.0%} of the trainable parameters")
    if stage.meta["correction_unavailable"]:
        said.append(f"stage '{stage.name}': {stage.meta['correction_unavailable']}")
    if stage.meta["status"] != "complete":
        said.append(f"stage '{stage.name}' is {stage.meta['status']}: {stage.meta['reason'] or 'still running'}")
    return said
