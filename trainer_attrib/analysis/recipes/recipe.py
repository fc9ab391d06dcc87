"""What a recipe is asked, what it answers, and what it must be able to do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from trainer_attrib.analysis.behavior import Behavior
from trainer_attrib.analysis.effects.lineage import Lineage
from trainer_attrib.analysis.examples import Examples
from trainer_attrib.analysis.influence_results import InfluenceExamples
from trainer_attrib.analysis.query_sketches import Sketcher, sketch_queries
from trainer_attrib.analysis.retrieval.faiss_candidates import Faiss
from trainer_attrib.analysis.retrieval.groups import StageSums
from trainer_attrib.analysis.retrieval.where import Where
from trainer_attrib.errors import MissingDataError
from trainer_attrib.ledger.reader import StageReader


@dataclass(frozen=True)
class Question:
    """Which examples of some stages made the model behave as it does?

    Args:
        lineage: the model at the end of its last stage, how it came there, and the behaviors.
        stages: whose examples are to be scored.
        data: examples given by name of the stage that was trained on them, for recipes that need their losses.
        carried: sketches queries that were carried back through later stages; None: gradients at the final weights.
        where: conditions that recorded rows must meet; an example is scored by those of its rows that do.
        keep: hold the scores of so many examples at either end of each stage's ranking only; None: of all.
        candidates: proposes the examples that are scored; None: all are.
    """

    lineage: Lineage
    stages: Sequence[StageReader]
    data: Mapping[str, Examples]
    carried: Sketcher | None = None
    where: Where | None = None
    keep: int | None = None
    candidates: Faiss | None = None

    @property
    def behaviors(self) -> Sequence[Behavior]:
        """What to explain; every item is a query."""
        return self.lineage.behaviors

    @property
    def queries(self) -> int:
        """How many queries all behaviors have together."""
        return sum(len(behavior) for behavior in self.behaviors)

    def sketches(self, stage: StageReader, version: int) -> Tensor:
        """Sketches of all queries as the stage's rows of one second-moment version are scaled, [Q, width]."""
        if self.carried is not None:
            return self.carried(stage, version)
        return sketch_queries(self.lineage.model, stage, version, self.behaviors, self.lineage.runner)

    def examples_of(self, stage: StageReader, recipe: str) -> Examples:
        """The examples given for a stage.

        Raises:
            MissingDataError: there are none.
        """
        if stage.name not in self.data:
            raise MissingDataError(
                f"Recipe '{recipe}' needs the examples of stage '{stage.name}' and their losses; given are those of "
                f"{sorted(self.data)}.",
                cause="a ledger holds compressed gradients of the examples, not the examples.",
                fix=f"pass data={{'{stage.name}': Examples.of_texts(texts, tokenizer, ids=ids)}}, or score the "
                "sketches captured in training (recipe='trackstar').",
            )
        return self.data[stage.name]


class Sketches:
    """Sketches of a question's queries, as a stage's rows of each second-moment version are scaled: [Q, width].

    They are made when they are first asked for. What travels to another process are those of all versions, not the
    model.
    """

    def __init__(self, question: Question, stage: StageReader) -> None:
        self._question, self._stage, self._known = question, stage, dict[int, Tensor]()

    def __call__(self, version: int) -> Tensor:
        """Of one version."""
        if version not in self._known:
            self._known[version] = self._question.sketches(self._stage, version)
        return self._known[version]

    def complete(self) -> None:
        """Make those of every version."""
        for version in range(len(self._stage.meta["versions"]) + 1):
            self(version)

    def __getstate__(self) -> dict[str, Any]:
        self.complete()
        return {"_known": self._known}


@dataclass(frozen=True)
class StageScores:
    """Scores of one stage's examples, float32 [Q, N]; ``caveats`` of this stage.

    Where only both ends were kept, ``places`` [Q, M] tells which example each of the [Q, M] scores is of. ``sums`` over
    groups of rows; None: they are made of the examples' scores.
    """

    examples: InfluenceExamples
    scores: np.ndarray
    caveats: tuple[str, ...] = ()
    places: np.ndarray | None = None
    sums: StageSums | None = None


def described(stage: StageReader, examples: Examples) -> InfluenceExamples:
    """Given examples as columns of a result, with the last step in which the stage recorded each (0: in none)."""
    steps: dict[str, int] = {}
    for block in stage.rows():
        for example, step in zip(block.table["example"].to_pylist(), block.table["step"].to_pylist(), strict=True):
            steps[example] = max(step, steps.get(example, 0))
    ids = np.array(examples.ids, dtype=object)
    names = np.array([stage.name] * len(ids), dtype=object)
    last = np.array([steps.get(example, 0) for example in examples.ids], np.int64)
    return InfluenceExamples(names, ids, last, list(examples.sources), list(examples.texts))


class Recipe(Protocol):
    """A way to score examples. Recipes are frozen values: their settings and nothing else."""

    @property
    def name(self) -> str:
        """As it appears in results."""
        ...

    @property
    def caveat(self) -> str:
        """What its scores are not, for people; ``""`` if the general caveat says it all."""
        ...

    def score(self, question: Question) -> list[StageScores]:
        """Scores for every stage of the question, in its order.

        Raises:
            AnalysisError: something is missing that the recipe needs.
        """
        ...
