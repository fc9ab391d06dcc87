"""Recipes that compare sketched rows, those captured during training above all: one stream over the rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from trainer_attrib.analysis.query_sketches import kept_columns, missing_weights
from trainer_attrib.analysis.recipes.recipe import Question, StageScores
from trainer_attrib.analysis.results import InfluenceExamples
from trainer_attrib.ledger.reader import RowBlock, StageReader
from trainer_attrib.numerics.sketching import unit_rows


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

    def stream(self, title: str) -> Iterator[tuple[RowBlock, np.ndarray, Rows]]:
        """Blocks with the positions in them of rows of one version, and these rows."""
        self.left_out, self.raw = {}, 0
        rates, corrected = _rates(self.reader), bool(self.reader.meta["versions"])
        blocks = self.reader.rows()
        total = len(self.reader.parts())
        for block in tqdm(blocks, desc=f"{title} {self.reader.name}", total=total, leave=False, disable=None):
            versions, complete = block.table["version"].to_numpy(), block.table["complete"].to_numpy()
            self._skip("some layers did not fire", int((~complete).sum()))
            for version in np.unique(versions):
                at = np.flatnonzero((versions == version) & complete)
                raw = corrected and version == 0
                if raw and not self.scale_free:
                    self._skip("raw rows from before the first second-moment version", len(at))
                elif len(at):
                    self.raw += raw * len(at)
                    yield block, at, self._rows(block, at, int(version), rates)

    def _rows(self, block: RowBlock, at: np.ndarray, version: int, rates: np.ndarray) -> Rows:
        table = block.table.take(at)
        unit_NK = torch.from_numpy(np.array(block.sketches[at], dtype=np.float32))
        norms_N = torch.from_numpy(np.array(table["norm"].to_numpy(), dtype=np.float32))
        if not self.keep.all():
            unit_NK, kept_N = unit_rows(unit_NK * self.keep)
            norms_N = norms_N * kept_N
        reach_N = rates[table["step"].to_numpy()] / table["denominator"].to_numpy()
        return Rows(unit_NK, norms_N, torch.from_numpy(np.array(reach_N, np.float32)), version)

    def _skip(self, reason: str, rows: int) -> None:
        if rows:
            self.left_out[reason] = self.left_out.get(reason, 0) + rows


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


@dataclass
class _Totals:
    """Sums over the visits of each example while rows stream by."""

    queries: int
    index: dict[str, int] = field(default_factory=dict)
    scores: np.ndarray = field(init=False)
    visits: np.ndarray = field(init=False)
    last_step: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.scores = np.zeros((self.queries, 0))
        self.visits, self.last_step = np.zeros(0), np.zeros(0, np.int64)

    def add(self, ids: list[str], steps: np.ndarray, scores_QN: np.ndarray) -> None:
        at = np.array([self.index.setdefault(i, len(self.index)) for i in ids])
        grow = len(self.index) - len(self.visits)
        self.scores = np.pad(self.scores, ((0, 0), (0, grow)))
        self.visits, self.last_step = np.pad(self.visits, (0, grow)), np.pad(self.last_step, (0, grow))
        for query in range(self.queries):
            np.add.at(self.scores[query], at, scores_QN[query])
        np.add.at(self.visits, at, 1)
        np.maximum.at(self.last_step, at, steps)


def _score_stage(recipe: RowRecipe, question: Question, reader: StageReader) -> StageScores:
    model = question.lineage.model
    stage, totals = StreamedStage(reader, kept_columns(model, reader), recipe.scale_free), _Totals(question.queries)
    sketched: dict[int, Tensor] = {}

    def sketch(version: int) -> Tensor:
        if version not in sketched:
            sketched[version] = question.sketches(reader, version)
        return sketched[version]

    score = recipe.prepare(stage, sketch)
    for block, at, rows in stage.stream("scoring"):
        table = block.table.take(at)
        scores_QN = score(rows).double().numpy()
        totals.add(table["example"].to_pylist(), table["step"].to_numpy(), scores_QN)
    shares = 1.0 if recipe.sums_visits else np.maximum(totals.visits, 1)
    found = (totals.scores / shares).astype(np.float32)
    return StageScores(_examples_of(reader, totals), found, (*_streamed(stage), *_caveats(question, reader)))


def _examples_of(stage: StageReader, totals: _Totals) -> InfluenceExamples:
    described = {row["example"]: row for row in stage.examples().to_pylist()}
    ids = list(totals.index)
    return InfluenceExamples(
        stages=np.array([stage.name] * len(ids), dtype=object),
        ids=np.array(ids, dtype=object),
        steps=totals.last_step,
        sources=[(described.get(i) or {}).get("source") for i in ids],
        texts=[(described.get(i) or {}).get("text") for i in ids],
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
