"""Influence functions from what training left behind: captured rows, and their second moments as curvature."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from trainer_attrib.analysis.recipes.proposed import Products
from trainer_attrib.analysis.recipes.recipe import Question, StageScores
from trainer_attrib.analysis.recipes.rows import Score, score_rows
from trainer_attrib.analysis.recipes.streamed import ByVersion, Rows, StreamedStage
from trainer_attrib.analysis.recipes.trackstar import training_moments
from trainer_attrib.numerics.row_curvature import damped_inverse, whiten
from trainer_attrib.numerics.scores import grad_dot
from trainer_attrib.tap.plan import SketchPlan


@dataclass(frozen=True)
class Fisher:
    """-q^T (R + damping)^(-1) g over captured rows g, mean over the example's visits; no data is needed.

    R is the second moment of the rows, layer by layer: the empirical Fisher information over all of training, which
    stands in for the curvature of the loss (Koh & Liang 2017, "Understanding black-box predictions via influence
    functions", with that Fisher for the Hessian). Only the order of the scores means something: an empirical Fisher
    shrinks with the losses, which curvature does not.

    Args:
        damping: in units of the mean eigenvalue of each layer's R.
    """

    damping: float = 0.1

    name = "fisher"
    caveat = "fisher orders examples; the size of its scores means nothing (recipe='gauss_newton' predicts sizes)"
    scale_free, sums_visits = False, False

    def score(self, question: Question) -> list[StageScores]:
        """See :meth:`trainer_attrib.analysis.recipes.recipe.Recipe.score`."""
        return score_rows(self, question)

    def prepare(self, stage: StreamedStage, sketch: Callable[[int], Tensor]) -> Score:
        """Fit R in one stream over the rows."""
        spans = SketchPlan.from_dict(stage.reader.meta["plan"]).row_spans
        moments = training_moments(stage, spans)[0]
        inverses = [damped_inverse(moment_KK, self.damping) for moment_KK in moments.means()]
        asked = ByVersion(lambda version: whiten(sketch(version), spans, inverses))

        def score(rows: Rows) -> Tensor:
            return grad_dot(asked(rows.version), rows.unit, rows.norms)

        return Products(score, lambda version: -asked(version), lambda rows: rows.unit * rows.norms[:, None])
