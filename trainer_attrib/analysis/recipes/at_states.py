"""Any recipe at one recorded state of the model after another: behaviors and examples both as they were there."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa

from trainer_attrib.analysis.influence_results import InfluenceExamples
from trainer_attrib.analysis.recipes.directional import refuse_carried
from trainer_attrib.analysis.recipes.recipe import Question, Recipe, StageScores
from trainer_attrib.analysis.retrieval.where import Where
from trainer_attrib.analysis.training_state import standing
from trainer_attrib.errors import ConfigurationError
from trainer_attrib.ledger.passes import PassReader
from trainer_attrib.ledger.reader import StageReader
from trainer_attrib.numerics.scores import standardized


@dataclass(frozen=True)
class StateScores:
    """Scores of one stage's examples at several states, standardized over the examples: float64 [S, Q, N], NaN where a
    state has none of an example."""

    names: tuple[str, ...]
    examples: InfluenceExamples
    scores: np.ndarray
    caveats: tuple[str, ...] = ()

    def __getitem__(self, name: str) -> np.ndarray:
        """Of one state, [Q, N]."""
        return self.scores[self.names.index(name)]

    def of(self, names: Sequence[str]) -> np.ndarray:
        """Of some states, [S, Q, N]."""
        return self.scores[[self.names.index(name) for name in names]]


def recorded_states(stage: StageReader) -> list[str]:
    """Snapshots at which the stage's examples can be scored, in the order of training: those of its passes, or all."""
    steps = {entry["name"]: entry["step"] for entry in stage.meta["snapshots"]}
    names = stage.snapshots if isinstance(stage, PassReader) else steps
    return sorted(names, key=lambda name: (steps[name], name == "end"))


def score_at_states(recipe: Recipe, question: Question, stage: StageReader, names: Sequence[str]) -> StateScores:
    """Scores of a stage's examples by a recipe that is asked at each of these states.

    Recipes over rows of training take of every example the row of its visit nearest to the state; of passes, the row at
    that snapshot.

    Raises:
        ConfigurationError: gradients were carried back, a recipe that scores no single states, or one without a pass.
        AnalysisError: something is missing that the recipe needs.
    """
    refuse_carried(question, recipe.name)
    if not hasattr(recipe, "snapshots") and not hasattr(recipe, "prepare"):
        raise ConfigurationError(
            f"Recipe '{recipe.name}' scores whole trainings, not states of the model.",
            fix="correct the scores of a recipe over rows, of 'directional', 'cea' or 'gauss_newton'.",
        )
    _check_passes(stage, names)
    whole = replace(question, keep=None, candidates=None)
    found = [_at(recipe, whole, stage, name) for name in names]
    examples, scores_SQN = _aligned(found)
    said = dict.fromkeys(caveat for part in found for caveat in part.caveats)
    return StateScores(tuple(names), examples, scores_SQN, tuple(said))


def _at(recipe: Recipe, question: Question, stage: StageReader, name: str) -> StageScores:
    if hasattr(recipe, "snapshots"):
        own: Any = recipe  # a frozen dataclass; the protocol cannot say so
        [found] = replace(own, snapshots=(name,)).score(replace(question, stages=[stage]))
        return found
    reader = PassReader(stage, [name]) if isinstance(stage, PassReader) else stage
    where = _nearest(stage, name, question.where)
    with standing(question.lineage.model, question.lineage.inside(stage, name)):
        [found] = recipe.score(replace(question, stages=[reader], where=where))
    return found


def _check_passes(stage: StageReader, names: Sequence[str]) -> None:
    known = recorded_states(stage)
    if missing := [name for name in names if name not in known]:
        made = isinstance(stage, PassReader)
        raise ConfigurationError(
            f"Stage '{stage.name}' has no rows at {missing}; there are some at {known}.",
            cause="the pass at these states was not asked for." if made else "no such snapshots were recorded.",
            fix=f"source=Snapshots({(*known, *missing)})." if made else "choose among those.",
        )


@dataclass(frozen=True, kw_only=True)
class NearestVisits(Where):
    """Of every example the row of that step in which it was trained on nearest to a state; the earlier of two.

    Args:
        steps_of: that step by example.
    """

    steps_of: Mapping[str, int] = field(default_factory=dict)

    def of_stage(self, sources: Callable[[], dict[str, str | None]]) -> Callable[[pa.Table], np.ndarray]:
        """See :meth:`trainer_attrib.analysis.retrieval.where.Where.of_stage`."""
        passes = super().of_stage(sources)

        def nearest(table: pa.Table) -> np.ndarray:
            columns = zip(table["example"].to_pylist(), table["step"].to_pylist(), strict=True)
            return passes(table) & np.array([self.steps_of.get(example) == step for example, step in columns], bool)

        return nearest


def _nearest(stage: StageReader, name: str, where: Where | None) -> Where | None:
    """The rows that stand for a state, among those that are wanted. All rows of a pass do."""
    if isinstance(stage, PassReader):
        return where
    at = next(entry["step"] for entry in stage.meta["snapshots"] if entry["name"] == name) + 0.5
    wanted = where or Where()
    passes, found = wanted.of_stage(stage.sources), dict[str, int]()
    for block in stage.rows():
        usable = block.table["complete"].to_numpy(False) & np.isfinite(block.table["norm"].to_numpy())
        table = block.table.filter(pa.array(passes(block.table) & usable))
        for example, step in zip(table["example"].to_pylist(), table["step"].to_pylist(), strict=True):
            if example not in found or (abs(step - at), step) < (abs(found[example] - at), found[example]):
                found[example] = step
    return NearestVisits(sources=wanted.sources, steps=wanted.steps, ids=wanted.ids, steps_of=found)


def _aligned(found: Sequence[StageScores]) -> tuple[InfluenceExamples, np.ndarray]:
    """All examples that any state scored, and their standardized scores."""
    whole = InfluenceExamples.concatenate([part.examples for part in found])
    ids, first, column = np.unique(whole.ids.astype(str), return_index=True, return_inverse=True)
    steps = np.zeros(len(ids), np.int64)
    np.maximum.at(steps, column, whole.steps)
    examples = InfluenceExamples(
        whole.stages[first], whole.ids[first], steps,
        [whole.sources[at] for at in first], [whole.texts[at] for at in first],
    )  # fmt: skip
    scores_SQN = np.full((len(found), found[0].scores.shape[0], len(ids)), np.nan)
    begin = 0
    for place_QN, part in zip(scores_SQN, found, strict=True):
        place_QN[:, column[begin : begin + len(part.examples)]] = standardized(part.scores)
        begin += len(part.examples)
    return examples, scores_SQN
