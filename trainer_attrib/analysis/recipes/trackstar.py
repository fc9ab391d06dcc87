"""TrackStar: optimizer-corrected rows, whitened by the task's and the training set's second moments, compared by angle.

Chang, Rajagopal, Bolukbasi, Dixon, Tenney 2024, "Scalable influence and fact tracing for large language model
pretraining", equations 1 to 3 and appendix A.1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from trainer_attrib.analysis.recipes.proposed import Products
from trainer_attrib.analysis.recipes.recipe import Question, StageScores
from trainer_attrib.analysis.recipes.rows import Score, score_rows
from trainer_attrib.analysis.recipes.streamed import ByVersion, Comparable, Part, Rows, StreamedStage
from trainer_attrib.numerics.row_curvature import SecondMoments, inverse_root, mixing_weight, shrunk, whiten
from trainer_attrib.numerics.scores import descent
from trainer_attrib.numerics.sketching import unit_rows
from trainer_attrib.tap.plan import SketchPlan

CROSSING = 64  # the spectra of task and training rows are made to cross at one component in so many


@dataclass(frozen=True)
class TrackStar:
    """Cosine of R^(-1/2) g over rows and queries; mean over the example's visits, in [-1, 1].

    R mixes the second moments of the training rows with what queries have in common, layer by layer: directions such as
    those of the queries' template count for less. Unlike the paper, which has thousands of queries, the part of the
    queries is the mean over pairs of different ones. In their plain second moments a few queries mostly find
    themselves, and whitening by these hides what is asked for (docs/influence.md).

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
        spans = SketchPlan.from_dict(stage.reader.meta["plan"]).row_spans
        train, last = training_moments(stage, spans, by_example=True)
        task = SecondMoments(spans)
        task.add(unit_rows(sketch(last))[0])  # queries count alike, whatever their gradient's norm
        roots = [inverse_root(moment_KK) for moment_KK in self.curvature(task, train)]
        asked = ByVersion(lambda version: whiten(sketch(version), spans, roots))
        directions = ByVersion(lambda version: descent(asked(version)))

        def score(rows: Rows) -> Tensor:
            unit_NK, stretch_N = unit_rows(whiten(rows.unit, spans, roots))
            if self.unit_norm:
                return directions(rows.version) @ (unit_NK * (rows.norms > 0)[:, None]).T
            return -(asked(rows.version) @ unit_NK.T) * (stretch_N * rows.norms)

        def vectors(rows: Rows) -> Tensor:
            unit_NK, stretch_N = unit_rows(whiten(rows.unit, spans, roots))
            return unit_NK * ((rows.norms > 0) if self.unit_norm else stretch_N * rows.norms)[:, None]

        return Products(score, lambda version: -asked(version), vectors, fixed=not self.task)

    def curvature(self, task: SecondMoments, train: SecondMoments) -> list[Tensor]:
        """R of every block, [K, K], up to a factor that all of them share."""
        if not self.train and not self.task:
            return [torch.eye(s.stop - s.start) for s in train.spans]
        trained = [shrunk(m, noise) for m, noise in zip(train.means(), train.noise(), strict=True)]
        if not self.task:
            return trained
        if not self.train:
            return [shrunk(m, noise) for m, noise in zip(task.means(), task.noise(), strict=True)]
        asked, trained = _of_trace_1(task.shared()), _of_trace_1(trained)
        weight = _crossing(asked, trained) if self.mixing is None else self.mixing
        return [weight * a_KK + (1 - weight) * t_KK for a_KK, t_KK in zip(asked, trained, strict=True)]


def training_moments(
    stage: StreamedStage, spans: list[slice], *, by_example: bool = False
) -> tuple[SecondMoments, int]:
    """Second moments of the rows, and the last second-moment version among them; see :class:`AccumulatePart`."""
    moments, last = SecondMoments(spans), 0
    for found, version in stage.map(AccumulatePart(spans, by_example), "curvature of", large=True):
        moments.merge(found)
        last = max(last, version)
    return moments, last


@dataclass(frozen=True)
class AccumulatePart:
    """Sums over the rows of a part, or of a few, and the last second-moment version among them.

    Args:
        spans: the columns of each block.
        by_example: whether rows of one example are told from those of others, which only their noise depends on.
    """

    spans: Sequence[slice]
    by_example: bool

    def __call__(self, _: Comparable, parts: Sequence[Part], __: int) -> tuple[SecondMoments, int]:
        """They do not depend on how many rows there are."""
        moments = SecondMoments(self.spans)
        for part in parts:
            examples = iter(part.table["example"].to_pylist() if self.by_example else ())
            for rows in part.rows():
                whose = list(islice(examples, len(rows.norms))) if self.by_example else None
                moments.add(rows.unit * rows.norms[:, None], whose)
        return moments, max((part.version for part in parts), default=0)


def _crossing(shared: list[Tensor], train: list[Tensor]) -> float:
    """As in the paper at one component in 64, or, since what queries share spans hardly more than a direction of each
    layer, in the middle of these."""
    return mixing_weight(shared, train, min(sum(map(len, train)) // CROSSING, len(shared) // 2))


def _of_trace_1(moments: list[Tensor]) -> list[Tensor]:
    total = float(sum(moment_KK.trace() for moment_KK in moments))
    return [moment_KK / total for moment_KK in moments] if total > 0 else moments
