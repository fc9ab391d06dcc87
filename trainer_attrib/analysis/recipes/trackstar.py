"""TrackStar: optimizer-corrected rows, whitened by the task's and the training set's second moments, compared by angle.

Chang, Rajagopal, Bolukbasi, Dixon, Tenney 2024, "Scalable influence and fact tracing for large language model
pretraining", equations 1 to 3 and appendix A.1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from trainer_attrib.analysis.recipes.recipe import Question, StageScores
from trainer_attrib.analysis.recipes.rows import Rows, Score, StreamedStage, score_rows
from trainer_attrib.numerics.row_curvature import SecondMoments, inverse_root, mixing_weight, shrunk, whiten
from trainer_attrib.numerics.scores import grad_cos
from trainer_attrib.numerics.sketching import unit_rows
from trainer_attrib.tap.plan import SketchPlan

CROSSING = 64  # the spectra of task and training rows are made to cross at one component in so many


@dataclass(frozen=True)
class TrackStar:
    """Cosine of R^(-1/2) g over rows and queries; mean over the example's visits, in [-1, 1].

    R mixes the second moments of the training rows with those of the queries, layer by layer: directions that the
    queries share, such as those of their common template, count for less. Both are shrunk by how much of them is
    noise: a few queries tell little about what queries have in common, and then hardly count.

    Args:
        train: whether training rows are part of R.
        task: whether queries are.
        mixing: weight of the queries' part, where both parts have the same trace; None: such that the two spectra cross
            as in the paper.
        unit_norm: compare by angle. Without it, by inner product, which examples with large gradients win.
    """

    train: bool = True
    task: bool = True
    mixing: float | None = None
    unit_norm: bool = True

    name, caveat = "trackstar", ""
    scale_free, sums_visits = False, False

    def score(self, question: Question) -> list[StageScores]:
        """See :meth:`trainer_attrib.analysis.recipes.recipe.Recipe.score`."""
        return score_rows(self, question)

    def prepare(self, stage: StreamedStage, sketch: Callable[[int], Tensor]) -> Score:
        """Fit R in one stream over the rows."""
        spans = [weight.span for weight in SketchPlan.from_dict(stage.reader.meta["plan"]).weights]
        train, last = _training_moments(stage, spans)
        task = SecondMoments(spans)
        task.add(unit_rows(sketch(last))[0])  # queries count alike, whatever their gradient's norm
        roots = [inverse_root(moment_KK) for moment_KK in self.curvature(task, train)]
        queries: dict[int, Tensor] = {}

        def score(rows: Rows) -> Tensor:
            if rows.version not in queries:
                queries[rows.version] = whiten(sketch(rows.version), spans, roots)
            unit_NK, stretch_N = unit_rows(whiten(rows.unit, spans, roots))
            if self.unit_norm:
                return grad_cos(queries[rows.version], unit_NK, rows.norms)
            return -(queries[rows.version] @ unit_NK.T) * (stretch_N * rows.norms)

        return score

    def curvature(self, task: SecondMoments, train: SecondMoments) -> list[Tensor]:
        """R of every block, [K, K], up to a factor that all of them share."""
        if not self.train and not self.task:
            return [torch.eye(s.stop - s.start) for s in train.spans]
        if not self.train or not self.task:
            moments = train if self.train else task
            return [shrunk(m, noise) for m, noise in zip(moments.means(), moments.noise(), strict=True)]
        asked, trained = _of_trace_1(task.means()), _of_trace_1(train.means())
        spanned = min(task.rows * len(task.spans), sum(map(len, trained)))
        weight = _crossing(asked, trained, spanned) if self.mixing is None else self.mixing
        # What shrinking the queries' moments would put in place of their noise is the same in all directions: it tells
        # nothing about what queries share, and would only dampen the training rows' part.
        parts = zip(asked, task.noise(), trained, train.noise(), strict=True)
        return [weight * (1 - a) * asked_KK + (1 - weight) * shrunk(t_KK, t) for asked_KK, a, t_KK, t in parts]


def _training_moments(stage: StreamedStage, spans: list[slice]) -> tuple[SecondMoments, int]:
    """Second moments of the rows, and the last second-moment version among them."""
    moments, last = SecondMoments(spans), 0
    for _, _, rows in stage.stream("curvature of"):
        moments.add(rows.unit * rows.norms[:, None])
        last = max(last, rows.version)
    return moments, last


def _crossing(task: list[Tensor], train: list[Tensor], spanned: int) -> float:
    """As in the paper at one component in 64; with few queries at half of what they span."""
    return mixing_weight(task, train, min(sum(map(len, train)) // CROSSING, spanned // 2))


def _of_trace_1(moments: list[Tensor]) -> list[Tensor]:
    total = float(sum(moment_KK.trace() for moment_KK in moments))
    return [moment_KK / total for moment_KK in moments] if total > 0 else moments
