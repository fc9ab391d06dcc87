"""TrackStar: optimizer-corrected rows, whitened by the task's and the training set's second moments, compared by angle.

Chang, Rajagopal, Bolukbasi, Dixon, Tenney 2024, "Scalable influence and fact tracing for large language model
pretraining", equations 1 to 3 and appendix A.1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from trainer_attrib.analysis.recipes.recipe import Question, StageScores
from trainer_attrib.analysis.recipes.rows import Rows, Score, StreamedStage, score_rows
from trainer_attrib.numerics.row_curvature import SecondMoments, inverse_root, mixing_weight, shrinkage, whiten
from trainer_attrib.numerics.scores import grad_cos
from trainer_attrib.numerics.sketching import unit_rows
from trainer_attrib.tap.plan import SketchPlan

CROSSING = 64  # the spectra of task and training rows are made to cross at one component in so many
SAMPLE = 4096  # rows on which the shrinkage is chosen


@dataclass(frozen=True)
class TrackStar:
    """Cosine of R^(-1/2) g over rows and queries; mean over the example's visits, in [-1, 1].

    R mixes the second moments of the training rows with those of the queries, layer by layer: directions that the
    queries share, such as those of their common template, count for less.

    Args:
        train: whether training rows are part of R.
        task: whether queries are.
        mixing: weight of the queries' part; None: such that the two spectra cross as in the paper.
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
        train, sample_NK, last = _training_moments(stage, spans)
        task = SecondMoments(spans)
        task.add(sketch(last))
        roots = self._roots(task, train, sample_NK)
        queries: dict[int, Tensor] = {}

        def score(rows: Rows) -> Tensor:
            if rows.version not in queries:
                queries[rows.version] = whiten(sketch(rows.version), spans, roots)
            unit_NK, stretch_N = unit_rows(whiten(rows.unit, spans, roots))
            if self.unit_norm:
                return grad_cos(queries[rows.version], unit_NK, rows.norms)
            return -(queries[rows.version] @ unit_NK.T) * (stretch_N * rows.norms)

        return score

    def _roots(self, task: SecondMoments, train: SecondMoments, sample_NK: Tensor) -> list[Tensor]:
        weight = self.mixing if self.mixing is not None else _crossing(task, train)
        weight = {(True, True): weight, (True, False): 0.0, (False, True): 1.0}.get((self.train, self.task))
        if weight is None:
            return [torch.eye(s.stop - s.start) for s in train.spans]
        shares = [shrinkage(sample_NK[:, s], m) for s, m in zip(train.spans, train.means(), strict=True)]
        mixed = [weight * a + (1 - weight) * b for a, b in zip(task.means(), train.means(), strict=True)]
        return [inverse_root(moment_KK, share) for moment_KK, share in zip(mixed, shares, strict=True)]


def _training_moments(stage: StreamedStage, spans: list[slice]) -> tuple[SecondMoments, Tensor, int]:
    """Second moments of the rows, some rows, and the last second-moment version among them."""
    moments, sample, last = SecondMoments(spans), list[Tensor](), 0
    for rows in _scaled(stage):
        moments.add(rows.unit * rows.norms[:, None])
        sample.append((rows.unit * rows.norms[:, None])[: max(0, SAMPLE - sum(map(len, sample)))])
        last = max(last, rows.version)
    width = spans[-1].stop if spans else 0
    return moments, torch.cat(sample) if sample else torch.zeros(0, width), last


def _scaled(stage: StreamedStage) -> Iterator[Rows]:
    for _, rows in stage.stream("curvature of"):
        yield rows


def _crossing(task: SecondMoments, train: SecondMoments) -> float:
    """As in the paper at one component in 64; with few queries at half of what they span."""
    components = sum(len(total_KK) for total_KK in train.sums)
    spanned = min(task.rows * len(task.spans), components)
    return mixing_weight(task.means(), train.means(), min(components // CROSSING, spanned // 2))
