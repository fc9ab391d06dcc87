"""Which training examples made the model say this? A recipe's scores, put together over the stages."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from trainer_attrib.analysis.controls import CONTROLS, controls_of
from trainer_attrib.analysis.recipes.directional import Directional
from trainer_attrib.analysis.recipes.fisher import Fisher
from trainer_attrib.analysis.recipes.gauss_newton import GaussNewton
from trainer_attrib.analysis.recipes.loss_difference import ContrastiveLossDifference
from trainer_attrib.analysis.recipes.products import GradCos, GradDot, TracIn
from trainer_attrib.analysis.recipes.recipe import Question, Recipe
from trainer_attrib.analysis.recipes.trackstar import TrackStar
from trainer_attrib.analysis.results import Influence, InfluenceExamples
from trainer_attrib.errors import ConfigurationError

RECIPES: dict[str, type[Recipe]] = {
    recipe.name: recipe
    for recipe in (GradCos, GradDot, TracIn, Fisher, TrackStar, GaussNewton, Directional, ContrastiveLossDifference)
}
NOT_ENTAILMENT = "influence is what training on an example did, not whether its text states the answer"


def influence(question: Question, recipe: str | Recipe, controls: Sequence[str] = CONTROLS) -> Influence:
    """Scores of every example of the question's stages, for every query, and what controls rank first beside them.

    Raises:
        ConfigurationError: an unknown recipe or control.
        AnalysisError: something is missing that the recipe needs.
    """
    chosen = recipe_of(recipe)
    found = chosen.score(question)
    general = [chosen.caveat] if chosen.caveat else []
    scores = np.concatenate([stage.scores for stage in found], axis=1)
    examples = InfluenceExamples.concatenate([stage.examples for stage in found])
    beside, missing = controls_of([name for name in controls if name != chosen.name], question, scores, examples)
    return Influence(
        behaviors=tuple(b.name for b in question.behaviors for _ in range(len(b))),
        queries=tuple(q for b in question.behaviors for q in b.queries),
        scores=scores,
        examples=examples,
        recipe=chosen.name,
        caveats=(*(c for stage in found for c in stage.caveats), *general, *missing, NOT_ENTAILMENT),
        beside=beside,
    )


def recipe_of(recipe: str | Recipe) -> Recipe:
    """The recipe of this name with default settings, or the recipe itself.

    Raises:
        ConfigurationError: there is none of this name.
    """
    if not isinstance(recipe, str):
        return recipe
    if recipe not in RECIPES:
        raise ConfigurationError(f"Unknown recipe {recipe!r}.", fix=f"use one of {sorted(RECIPES)}.")
    return RECIPES[recipe]()
