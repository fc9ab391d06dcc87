"""Inner products and cosines of captured rows with the gradients of behaviors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from trainer_attrib.analysis.recipes.proposed import Products
from trainer_attrib.analysis.recipes.recipe import Question, StageScores
from trainer_attrib.analysis.recipes.rows import Score, score_rows
from trainer_attrib.analysis.recipes.streamed import ByVersion, Rows, StreamedStage
from trainer_attrib.numerics.scores import descent, grad_dot
from trainer_attrib.numerics.second_moment import root_mean


@dataclass(frozen=True)
class GradDot:
    """Inner product of the behavior's gradient and minus the example's, both divided by the root of the optimizer's
    second moments; mean over the example's visits (Pruthi et al. 2020, "TracIn", for one checkpoint)."""

    name, caveat = "grad_dot", ""
    scale_free, sums_visits = False, False

    def score(self, question: Question) -> list[StageScores]:
        """See :meth:`trainer_attrib.analysis.recipes.recipe.Recipe.score`."""
        return score_rows(self, question)

    def prepare(self, stage: StreamedStage, sketch: Callable[[int], Tensor]) -> Score:
        """Nothing to prepare."""
        return Products(
            lambda rows: grad_dot(sketch(rows.version), rows.unit, rows.norms),
            lambda version: -sketch(version),
            lambda rows: rows.unit * rows.norms[:, None],
        )


@dataclass(frozen=True)
class GradCos:
    """Cosine of the same two vectors; mean over the example's visits. Examples with large gradients do not win."""

    name, caveat = "grad_cos", ""
    scale_free, sums_visits = True, False

    def score(self, question: Question) -> list[StageScores]:
        """See :meth:`trainer_attrib.analysis.recipes.recipe.Recipe.score`."""
        return score_rows(self, question)

    def prepare(self, stage: StreamedStage, sketch: Callable[[int], Tensor]) -> Score:
        """Nothing to prepare."""
        asked = ByVersion(lambda version: descent(sketch(version)))
        return Products(
            lambda rows: asked(rows.version) @ rows.unit.T,
            lambda version: -sketch(version),
            lambda rows: rows.unit * (rows.norms > 0)[:, None],
        )


@dataclass(frozen=True)
class TracIn:
    """What each step's part of the example would change the behavior by, at its final gradient: learning rate actually
    used, times the example's share of the batch, times the inner product with its gradient over the root of the
    second moments; summed over the example's visits (Pruthi et al. 2020, "TracIn", equation 3, with all steps as
    checkpoints and the behavior's gradient at the last one, and Adam's step for SGD's).
    """

    name = "tracin"
    caveat = "tracin takes the behavior's gradient at the final weights for that of every step"
    scale_free, sums_visits = False, True

    def score(self, question: Question) -> list[StageScores]:
        """See :meth:`trainer_attrib.analysis.recipes.recipe.Recipe.score`."""
        return score_rows(self, question)

    def prepare(self, stage: StreamedStage, sketch: Callable[[int], Tensor]) -> Score:
        """Rows are scaled by unit / sqrt(V), so the query is not: one division is what an optimizer does."""
        raw_QK, units = sketch(0), {}

        def score(rows: Rows) -> Tensor:
            if rows.version not in units:
                units[rows.version] = root_mean(stage.reader.factors(rows.version).values())
            return grad_dot(raw_QK, rows.unit, rows.norms) * rows.reach / units[rows.version]

        return score
