"""Derivatives of the examples' losses along the way that a step towards the behavior would take: no sketches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from torch import nn

from trainer_attrib.analysis.behavior import Behavior
from trainer_attrib.analysis.displacement import Displacement
from trainer_attrib.analysis.effects.slopes import gradients
from trainer_attrib.analysis.examples import Examples
from trainer_attrib.analysis.forward_mode import Slopes
from trainer_attrib.analysis.recipes.recipe import Question, StageScores, described
from trainer_attrib.analysis.recipes.stage_states import StageState, missing_trained, stage_states
from trainer_attrib.analysis.training_state import random_states_kept, standing
from trainer_attrib.errors import ConfigurationError
from trainer_attrib.ledger.reader import StageReader
from trainer_attrib.progress import progress


@dataclass(frozen=True)
class Directional:
    """-(derivative of the example's loss along u), u = P times the behavior's gradient: what an optimizer step on the
    example alone would change the behavior by, to first order, in the behavior's unit; mean over the stage's steps.

    P is how far a step moved each weight per unit of gradient: the learning rate actually used, over the root of the
    optimizer's second moment where it has one. It is the inner product of TracIn (Pruthi et al. 2020, equation 3)
    without a projection. A pass over the examples for every query and state, which costs about what a forward and
    backward pass costs, in the memory of a forward pass.

    Args:
        snapshots: recorded states at which behavior and examples are differentiated, each standing for the steps that
            are nearest to it; none stands for all.
    """

    snapshots: tuple[str, ...] = ("end",)

    name = "directional"
    caveat = "directional compares gradients at the same weights: what later steps and stages made of it is not in it"

    def score(self, question: Question) -> list[StageScores]:
        """See :meth:`trainer_attrib.analysis.recipes.recipe.Recipe.score`."""
        refuse_carried(question, self.name)
        given = [(stage, question.examples_of(stage, self.name)) for stage in question.stages]
        with random_states_kept():
            return [self._score(question, stage, examples) for stage, examples in given]

    def _score(self, question: Question, stage: StageReader, examples: Examples) -> StageScores:
        scores_QN, inexact = np.zeros((question.queries, len(examples))), False
        for way in ways(question, stage, self.snapshots):
            slopes = Slopes(way.model, way.direction)
            for positions in progress(examples.batches(), f"scoring {stage.name}, query {way.query + 1}"):
                items = examples.items(positions)
                scores_QN[way.query, positions] -= slopes(
                    lambda model, items=items: examples.loss(model, items)
                ).numpy()
            inexact |= not slopes.exact
        caveats = (*stage_caveats(question, stage), *([_inexact(stage)] if inexact else []))
        return StageScores(described(stage, examples), scores_QN.astype(np.float32), caveats)


@dataclass(frozen=True)
class Way:
    """A direction towards more of one query's behavior, in a model that stands at a state of the stage."""

    model: nn.Module
    behavior: Behavior
    item: int
    query: int
    gradient: Displacement
    direction: Displacement
    state: StageState = field(repr=False)


def ways(question: Question, stage: StageReader, snapshots: tuple[str, ...]) -> Iterator[Way]:
    """For every state and query in turn; the model stands at the state while the way is used, and is bit-identical
    afterwards.

    Raises:
        BehaviorError: a behavior has no gradient.
        NotComparableError: the model has none of the weights that the stage trained.
        StageNotFoundError: no such snapshot.
    """
    model = question.lineage.model
    for state in stage_states(question.lineage, stage, snapshots):
        query = 0
        with standing(model, state.training):
            for behavior in question.behaviors:
                for item, gradient in enumerate(gradients(model, behavior, state.reach)):
                    yield Way(model, behavior, item, query, gradient, state.direction(gradient), state)
                    query += 1


def refuse_carried(question: Question, recipe: str) -> None:
    """Sketches of carried gradients have no direction in weight space.

    Raises:
        ConfigurationError: gradients were carried back.
    """
    if question.carried is not None:
        raise ConfigurationError(
            f"Recipe '{recipe}' cannot use gradients carried back through later stages.",
            cause="it differentiates the behaviors at states of the scored stage itself.",
            fix="leave out `carry`, or use a recipe over captured rows such as 'trackstar'.",
        )


def stage_caveats(question: Question, stage: StageReader) -> list[str]:
    """What the scores of a stage leave out."""
    said, optimizers = [], stage.meta["optimizers"]
    if gone := missing_trained(question.lineage, stage):
        said.append(f"stage '{stage.name}': {len(gone)} weights that the model no longer has are left out")
    moments = any("moments" in entry for entry in stage.meta["snapshots"])
    if not moments and not all(optimizer["class"].endswith(".SGD") for optimizer in optimizers):
        said.append(f"stage '{stage.name}': no second moments were recorded, steps are taken to be those of SGD")
    return said


def _inexact(stage: StageReader) -> str:
    return (
        f"stage '{stage.name}': derivatives are central differences, since the model or its loss has no forward-mode "
        "derivative"
    )
