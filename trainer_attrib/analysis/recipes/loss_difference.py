"""Contrastive error attribution: the losses of a model moved towards the behavior against those of one moved away."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from trainer_attrib.analysis.displacement import moved
from trainer_attrib.analysis.effects.slopes import inner
from trainer_attrib.analysis.examples import Examples
from trainer_attrib.analysis.forward_mode import difference, quiet
from trainer_attrib.analysis.recipes.directional import Way, refuse_carried, stage_caveats, ways
from trainer_attrib.analysis.recipes.recipe import Question, StageScores, described
from trainer_attrib.analysis.training_state import random_states_kept
from trainer_attrib.ledger.reader import StageReader
from trainer_attrib.progress import progress

TRIALS, CLOSE = 8, 0.1
"""How often the size of a move is corrected, and by which share of the wanted change it may miss."""


@dataclass(frozen=True)
class ContrastiveLossDifference:
    """(loss of the example in the model moved by -s u, minus its loss in the one moved by s u) / 2 s, with u as in
    :class:`trainer_attrib.analysis.recipes.directional.Directional`, whose score is the limit for small s and whose
    unit this has.

    Ladhak, Durmus and Hashimoto 2023, "Contrastive error attribution for finetuned language models": there, the models
    are fine-tuned for three steps each on wrong outputs and on corrected ones. Here, one step of the optimizer's metric
    goes along the gradient of the behavior (right minus wrong for ``Behavior.contrast``), and s is such that the
    behavior differs by ``change`` between the two models: small enough to stay what the model is, large enough to be
    told from rounding. Forward passes alone: two over the examples for every query and state.

    Args:
        change: of the behavior between the two models, in its unit.
        snapshots: as for ``Directional``.
    """

    change: float = 1.0
    snapshots: tuple[str, ...] = ("end",)

    name = "cea"
    caveat = (
        "cea moves the weights by a finite step: examples whose losses curve along it are not scored to first order"
    )

    def score(self, question: Question) -> list[StageScores]:
        """See :meth:`trainer_attrib.analysis.recipes.recipe.Recipe.score`."""
        refuse_carried(question, self.name)
        given = [(stage, question.examples_of(stage, self.name)) for stage in question.stages]
        with random_states_kept():
            return [self._score(question, stage, examples) for stage, examples in given]

    def _score(self, question: Question, stage: StageReader, examples: Examples) -> StageScores:
        scores_QN, missed = np.zeros((question.queries, len(examples))), 0
        for way in ways(question, stage, self.snapshots):
            step, reached = self.step(way)
            missed += not reached
            if step == 0:
                continue  # no weight that the stage trained matters to this query
            for sign in (1, -1):
                with moved(way.model, {n: sign * step * u for n, u in way.direction.items()}), quiet(way.model):
                    for positions in progress(examples.batches(), f"scoring {stage.name}, query {way.query + 1}"):
                        losses = examples.loss(way.model, examples.items(positions)).double().cpu().numpy()
                        scores_QN[way.query, positions] -= sign * losses / (2 * step)
        caveats = stage_caveats(question, stage)
        if missed:
            caveats.append(
                f"stage '{stage.name}': {missed} moves change the behavior by something else than {self.change:g}"
            )
        return StageScores(described(stage, examples), scores_QN.astype(np.float32), tuple(caveats))

    def step(self, way: Way) -> tuple[float, bool]:
        """How many times u the weights are moved to each side, and whether the behavior then differs as it should; 0
        where u is 0. The first guess is that of a linear behavior; it is corrected by what it gives."""
        slope = float(inner(way.gradient, way.direction))
        if slope == 0:
            return 0.0, False
        step = self.change / (2 * slope)
        for _ in range(TRIALS):
            found = float(difference(way.model, way.direction, step, lambda m: way.behavior.value_of(m, way.item)))
            if abs(found - self.change) <= CLOSE * self.change:
                return step, True
            step *= min(max(self.change / found, 0.5), 2.0) if found > 0 else 0.5
        return step, False
