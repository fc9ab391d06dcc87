"""Debias and denoise: a recipe's scores at several states of the model, without those of the base model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from types import MappingProxyType

import numpy as np

from trainer_attrib.analysis.recipes.at_states import StateScores, recorded_states, score_at_states
from trainer_attrib.analysis.recipes.products import GradCos
from trainer_attrib.analysis.recipes.recipe import Question, Recipe, StageScores
from trainer_attrib.errors import ConfigurationError
from trainer_attrib.ledger.reader import StageReader
from trainer_attrib.numerics.scores import debiased, denoised, rank

BASE = "start"
"""The snapshot of the model as it was before the stage."""
UNCHECKED = (
    "debiasing is as likely to hurt as to help, and can turn a ranking upside down: check it by `analyzer.calibrate`"
)


@dataclass(frozen=True)
class Dda:
    """Sum over states of w_t z_t(example), minus beta z_0(example), in standard deviations over the stage's examples.

    z_t are the standardized scores of another recipe with behaviors and examples at a recorded state t of the stage,
    z_0 those at its start, before it taught anything (Wu, Pang, Shen and Cheng 2024, "Enhancing training data
    attribution for large language models with fitting error consideration", DDA). The mean over states is *denoising*,
    the subtraction *debiasing*. ``Dda()`` is the published composition as far as it is known: the paper's abstract
    describes it, its code was never published, and whether it standardizes, and its beta, are choices made here.

    Args:
        recipe: over captured rows, or ``Directional``, ``ContrastiveLossDifference``, ``GaussNewton``.
        beta: how much of the base model's scores to take out; 0 denoises only, negative adds them.
        weights: of the states by snapshot; all after the start alike by default. Signed ones, with the start among
            them, are what :meth:`trainer_attrib.Analyzer.calibrate` fits; they are used as they are, with beta 0.

    Raises:
        ConfigurationError: weights that are all 0, or that have the start beside a beta.
    """

    recipe: Recipe = field(default_factory=GradCos)
    beta: float = 1.0
    weights: Mapping[str, float] | None = None

    name, caveat = "dda", ""

    def __post_init__(self) -> None:
        if self.weights is None:
            return
        if not any(self.weights.values()) or (self.beta and BASE in self.weights):
            raise ConfigurationError(
                f"Dda got weights={dict(self.weights)} with beta={self.beta:g}.",
                fix="give some state a weight that is not 0; the start has one, or beta, not both.",
            )
        object.__setattr__(self, "weights", MappingProxyType(dict(self.weights)))

    def score(self, question: Question) -> list[StageScores]:
        """See :meth:`trainer_attrib.analysis.recipes.recipe.Recipe.score`."""
        return [self._of_stage(question, stage) for stage in question.stages]

    def states(self, stage: StageReader) -> list[str]:
        """The states that are averaged, and the start if it takes part."""
        if self.weights is not None:
            return [*self.weights, *([BASE] if self.beta else [])]
        names = [name for name in recorded_states(stage) if name != BASE]
        return [*names, *([BASE] if self.beta or not names else [])]

    def combine(self, found: StateScores) -> np.ndarray:
        """The corrected scores, float64 [Q, N].

        Args:
            found: scores at these states.
        """
        return self._steps(found)[-1][1]

    def _of_stage(self, question: Question, stage: StageReader) -> StageScores:
        found = score_at_states(self.recipe, question, stage, self.states(stage))
        steps = self._steps(found)
        ids_N = found.examples.ids.astype(str)
        said = [f"stage '{stage.name}': {what}" for what in _told(steps, self.recipe.name, ids_N)]
        if self.beta > 0:
            said.append(UNCHECKED)
        general = [self.recipe.caveat] if self.recipe.caveat else []
        return StageScores(found.examples, steps[-1][1].astype(np.float32), (*found.caveats, *general, *said))

    def _steps(self, found: StateScores) -> list[tuple[str, np.ndarray]]:
        """The scores at the last state, and after each correction, with what it was."""
        names = [name for name in (self.weights or found.names) if name != BASE or len(found.names) == 1]
        given = None if self.weights is None else np.array([self.weights[name] for name in names])
        steps = [("", found[names[-1]] if names else found[BASE])]
        if self.weights is not None and (BASE in self.weights or min(self.weights.values()) < 0):
            signed = "  ".join(f"{weight:+.2f} {name}" for name, weight in self.weights.items())
            whole_SQN = found.of([*self.weights])
            sums_QN = np.tensordot(np.array([*self.weights.values()]), np.nan_to_num(whole_SQN), 1)
            nowhere_QN = np.isnan(whole_SQN).all(0)
            return [*steps, (f"states were weighted {signed}", np.where(nowhere_QN, np.nan, sums_QN))]
        if len(names) > 1:
            steps.append((f"denoised: mean over {', '.join(names)}", denoised(found.of(names), given)))
        if self.beta and len(found.names) > 1:
            without = debiased(steps[-1][1], found[BASE], self.beta)
            steps.append((f"debiased: {self.beta:g} times the scores at '{BASE}' taken out", without))
        return steps


def _told(steps: Sequence[tuple[str, np.ndarray]], recipe: str, ids_N: np.ndarray) -> list[str]:
    """Which corrections ran, and what each changed."""
    if len(steps) == 1:
        return [f"scores of {recipe} at one state, nothing was corrected"]
    return [
        f"scores of {recipe} {what}; {_changed(before, after, ids_N)}" for (_, before), (what, after) in pairwise(steps)
    ]


def _changed(before_QN: np.ndarray, after_QN: np.ndarray, ids_N: np.ndarray, k: int = 10) -> str:
    kept, alike = [], []
    for before_N, after_N in zip(before_QN, after_QN, strict=True):
        tops = [set(rank(scores_N, ids_N, k, largest=True)) for scores_N in (before_N, after_N)]
        kept.append(len(tops[0] & tops[1]))
        known = ~(np.isnan(before_N) | np.isnan(after_N))
        before_K, after_K = (np.argsort(np.argsort(scores_N[known])) for scores_N in (before_N, after_N))
        alike.append(np.corrcoef(before_K, after_K)[0, 1] if known.sum() > 1 else np.nan)
    return (
        f"rank correlation with the scores before it {np.nanmean(alike):.2f}, {np.mean(kept):.1f} of the top {k} stay"
    )
