"""Which training examples made the model say this? Scores from the sketches captured while it trained."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from trainer_attrib.analysis.behavior import Behavior
from trainer_attrib.analysis.query_sketches import kept_columns, missing_weights, sketch_queries
from trainer_attrib.analysis.results import Influence, InfluenceExamples
from trainer_attrib.errors import ConfigurationError
from trainer_attrib.ledger.reader import RowBlock, StageReader
from trainer_attrib.numerics.scores import grad_cos, grad_dot
from trainer_attrib.numerics.sketching import unit_rows

Score = Callable[[Tensor, Tensor, Tensor], Tensor]
RECIPES: dict[str, Score] = {"grad_cos": grad_cos, "grad_dot": grad_dot}
_SCALE_FREE = {"grad_cos"}


@dataclass
class _Totals:
    """Sums over the visits of each example while rows stream by."""

    queries: int
    index: dict[str, int] = field(default_factory=dict)
    scores: np.ndarray = field(init=False)
    visits: np.ndarray = field(init=False)
    last_step: np.ndarray = field(init=False)
    left_out: dict[str, int] = field(default_factory=dict)
    raw: int = 0  # rows scored in a scaling of their own, from before the stage's first second-moment version

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

    def skip(self, reason: str, rows: int) -> None:
        if rows:
            self.left_out[reason] = self.left_out.get(reason, 0) + rows


Sketcher = Callable[[StageReader, int], Tensor]
"""Stage and version of its second moments -> sketches of all queries, [Q, width]."""


def influence(
    model: nn.Module,
    stages: Sequence[StageReader],
    behaviors: Sequence[Behavior],
    recipe: str,
    sketcher: Sketcher | None = None,
) -> Influence:
    """Mean score of every example over its visits in training, for every query.

    Rows of each second-moment version are compared with the query sketched in that version's scaling. Rows from before
    a stage's first version are raw: a cosine does not mind, so they are used and the caveats say so; a dot product
    would mix two scales, so ``grad_dot`` leaves them out and says so.

    Queries are the gradients of the behaviors at the model's weights, unless a ``sketcher`` has others.

    Raises:
        ConfigurationError: an unknown recipe.
        NotComparableError: the model has none of the weights of a stage's rows.
    """
    if recipe not in RECIPES:
        raise ConfigurationError(f"Unknown recipe {recipe!r}.", fix=f"use one of {sorted(RECIPES)}.")
    queries = sum(len(b) for b in behaviors)
    sketch = sketcher or (lambda stage, version: sketch_queries(model, stage, version, behaviors))
    tables, scores, caveats = [], [], []
    for stage in stages:
        totals = _score_stage(model, stage, sketch, recipe, queries)
        tables.append(_examples_of(stage, totals))
        scores.append((totals.scores / np.maximum(totals.visits, 1)).astype(np.float32))
        caveats += [f"stage '{stage.name}': {n} rows left out: {why}" for why, n in totals.left_out.items()]
        if totals.raw:
            caveats.append(
                f"stage '{stage.name}': {totals.raw} rows are raw (no second moments yet) and were scored as such"
            )
        if gone := missing_weights(model, stage):
            caveats.append(f"stage '{stage.name}': {len(gone)} weights that the model no longer has are left out")
        caveats += _stage_caveats(stage)
    return Influence(
        behaviors=tuple(b.name for b in behaviors for _ in range(len(b))),
        queries=tuple(q for b in behaviors for q in b.queries),
        scores=np.concatenate(scores, axis=1),
        examples=InfluenceExamples.concatenate(tables),
        recipe=recipe,
        caveats=(*caveats, "influence is what training on an example did, not whether its text states the answer"),
    )


def _score_stage(model: nn.Module, stage: StageReader, sketch: Sketcher, recipe: str, queries: int) -> _Totals:
    totals, sketched, keep = _Totals(queries), {}, kept_columns(model, stage)
    mixes_scales = bool(stage.meta["versions"]) and recipe not in _SCALE_FREE
    for block in tqdm(stage.rows(), desc=f"scoring {stage.name}", total=len(stage.parts()), leave=False, disable=None):
        versions = block.table["version"].to_numpy()
        complete = block.table["complete"].to_numpy()
        totals.skip("some layers did not fire", int((~complete).sum()))
        for version in np.unique(versions):
            rows = np.flatnonzero((versions == version) & complete)
            if version == 0 and mixes_scales:
                totals.skip("raw rows from before the first second-moment version", len(rows))
                continue
            if version == 0 and stage.meta["versions"]:
                totals.raw += len(rows)
            if version not in sketched:
                sketched[version] = sketch(stage, int(version))
            if len(rows):
                _score_rows(totals, block, rows, sketched[version], keep, RECIPES[recipe])
    return totals


def _score_rows(
    totals: _Totals, block: RowBlock, rows: np.ndarray, queries_QK: Tensor, keep_K: Tensor, score: Score
) -> None:
    table = block.table.take(rows)
    unit_NK = torch.from_numpy(np.array(block.sketches[rows], dtype=np.float32))
    norms_N = torch.from_numpy(np.array(table["norm"].to_numpy(), dtype=np.float32))
    if not keep_K.all():
        unit_NK, kept_N = unit_rows(unit_NK * keep_K)
        norms_N = norms_N * kept_N
    scores_QN = score(queries_QK, unit_NK, norms_N).double().numpy()
    totals.add(table["example"].to_pylist(), table["step"].to_numpy(), scores_QN)


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


def _stage_caveats(stage: StageReader) -> list[str]:
    said = []
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
