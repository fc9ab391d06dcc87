"""Which training examples made the model say this? A recipe's scores, put together over the stages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from trainer_attrib.analysis.controls import CONTROLS, controls_of
from trainer_attrib.analysis.influence_results import Influence, InfluenceExamples
from trainer_attrib.analysis.recipes.dda import Dda
from trainer_attrib.analysis.recipes.directional import Directional
from trainer_attrib.analysis.recipes.fisher import Fisher
from trainer_attrib.analysis.recipes.gauss_newton import GaussNewton
from trainer_attrib.analysis.recipes.loss_difference import ContrastiveLossDifference
from trainer_attrib.analysis.recipes.products import GradCos, GradDot, TracIn
from trainer_attrib.analysis.recipes.recipe import Question, Recipe, StageScores
from trainer_attrib.analysis.recipes.trackstar import TrackStar
from trainer_attrib.analysis.recipes.unrolled import Unrolled
from trainer_attrib.analysis.retrieval.ends import ends_of
from trainer_attrib.analysis.retrieval.groups import StageSums
from trainer_attrib.analysis.retrieval.sources import coded
from trainer_attrib.errors import ConfigurationError

_RECIPES: tuple[type[Recipe], ...] = (
    GradCos, GradDot, TracIn, Fisher, TrackStar, GaussNewton, Directional, ContrastiveLossDifference, Unrolled,
    Dda,
)  # fmt: skip
RECIPES: dict[str, type[Recipe]] = {recipe.name: recipe for recipe in _RECIPES}
NOT_ENTAILMENT = "influence is what training on an example did, not whether its text states the answer"


def influence(question: Question, recipe: str | Recipe, controls: Sequence[str] = CONTROLS) -> Influence:
    """Scores of every example of the question's stages, for every query, and what controls rank first beside them.

    Raises:
        ConfigurationError: an unknown recipe or control, conditions on rows for a recipe that reads none, or candidates
            for a recipe whose scores are no products of rows with queries.
        AnalysisError: something is missing that the recipe needs.
    """
    chosen = recipe_of(recipe)
    if question.where is not None and not _reads_rows(chosen):
        raise ConfigurationError(
            f"Recipe '{chosen.name}' scores the given examples, `where` chooses among recorded rows.",
            fix="leave out of `data` what is not to be scored.",
        )
    if question.candidates is not None and not hasattr(chosen, "prepare"):
        raise ConfigurationError(
            f"Recipe '{chosen.name}' has no candidates: it does not compare recorded rows.",
            fix="leave out `candidates`, or use trackstar, fisher, grad_cos or grad_dot.",
        )
    stages = chosen.score(question)
    sums = tuple(stage.sums or _sums_of(stage) for stage in stages)
    if question.keep is not None:
        stages = [_kept(stage, question.keep) for stage in stages]
    firsts = np.cumsum([0, *(len(stage.examples) for stage in stages)])[:-1]
    places = [stage.places + first for stage, first in zip(stages, firsts, strict=True) if stage.places is not None]
    general = [chosen.caveat] if chosen.caveat else []
    scores = stages[0].scores if len(stages) == 1 else np.concatenate([stage.scores for stage in stages], axis=1)
    examples = InfluenceExamples.concatenate([stage.examples for stage in stages])
    wanted = [] if question.keep is not None else [name for name in controls if name != chosen.name]
    beside, missing = controls_of(wanted, question, scores, examples)
    return Influence(
        behaviors=tuple(b.name for b in question.behaviors for _ in range(len(b))),
        queries=tuple(q for b in question.behaviors for q in b.queries),
        scores=scores,
        examples=examples,
        recipe=chosen.name,
        caveats=(*(c for stage in stages for c in stage.caveats), *general, *missing, NOT_ENTAILMENT),
        beside=beside,
        places=np.concatenate(places, axis=1) if places else None,
        keep=question.keep,
        sums=sums,
    )


def _reads_rows(recipe: Recipe) -> bool:
    """Itself, or by the recipe whose scores it corrects."""
    return hasattr(getattr(recipe, "recipe", recipe), "prepare")


def _kept(stage: StageScores, keep: int) -> StageScores:
    if stage.places is not None:
        return stage
    scores, places = ends_of(stage.scores, stage.examples.ids, keep)
    return replace(stage, scores=scores, places=places)


def _sums_of(stage: StageScores) -> StageSums:
    """Over examples, at the last step of each: the recipe did not score visits."""
    examples = stage.examples
    sums = StageSums(str(examples.stages[0]) if len(examples) else "")
    sums.add(*coded(examples.sources), examples.steps, stage.scores)
    return sums


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
