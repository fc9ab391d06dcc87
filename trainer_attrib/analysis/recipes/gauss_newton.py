"""Influence functions with the curvature of the loss, damped by how far training went.

Rows are gradients in the eigenbasis of K-FAC's factors, where curvature is nearly diagonal (George et al. 2018,
"EK-FAC"; Grosse et al. 2023, "Studying large language model generalization with influence functions"); in small models
every layer's block is fitted whole. All is measured in the metric of training, so that there is no damping to choose.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from trainer_attrib.analysis.behavior import Behavior
from trainer_attrib.analysis.examples import Examples
from trainer_attrib.analysis.gradient_rows import GradientRows
from trainer_attrib.analysis.query_sketches import missing_weights
from trainer_attrib.analysis.recipes.captured_basis import captured_basis
from trainer_attrib.analysis.recipes.recipe import Question, StageScores, described
from trainer_attrib.analysis.recipes.training_metric import TrainingMetric, training_metric
from trainer_attrib.analysis.training_state import standing
from trainer_attrib.ledger.reader import StageReader
from trainer_attrib.numerics.curvature_fit import CurvatureFit, fit_whole
from trainer_attrib.progress import progress
from trainer_attrib.tap.names import modules_by_name
from trainer_attrib.tap.plan import SketchPlan
from trainer_attrib.tap.projections import Projections

UNKNOWN_STEPS = (
    "stage '{stage}': its optimizer's steps are not known here, so that curvature is damped by a tenth of its mean "
    "instead of by how far training went"
)

_RANK, _RANK_OF_WHOLE = 64, 32  # coordinates kept unless said otherwise, and where curvature would be whole matrices
_LONGER = 1.25  # whole gradients may be so many times longer than rows


@dataclass(frozen=True)
class GaussNewton:
    """-q^T P^(1/2) (P^(1/2) G P^(1/2) + decay + 1)^(-1) P^(1/2) g / N: by how much training on an example changed a
    behavior with gradient q, in its unit, to first order; mean over the recorded states of the model.

    G is the Gauss-Newton matrix of the mean loss, g the example's gradient, P how far training moved a weight per unit
    of gradient, all at one state. States along the way know what the example did before the model had learned it, when
    its gradient was still large. Each costs a pass over the data for the scores and one over parts of it for curvature.

    Args:
        snapshots: names of recorded states; None: all that the stage recorded after its start.
        rank: coordinates kept on each side of a weight. None: 64, but 32 where the curvature of 64 would be kept as
            whole matrices, which costs many times as much and gains next to nothing (docs/log.md).
        wide: coordinates on each side among which they are looked for; longer sides are projected at random first.
        basis: how many examples the coordinates are fitted to.
        sample: how many examples curvature is fitted to.
        leading: coordinates of each weight whose curvature is kept as a whole where that of the weight is too large;
            of the others, the diagonal is.
        flattened: share of the damping that such diagonals take.
        seed: of these choices, and of the predictions drawn for the curvature.
    """

    snapshots: tuple[str, ...] | None = None
    rank: int | None = None
    wide: int = 1024
    basis: int = 512
    sample: int = 4096
    leading: int = 512
    flattened: float = 0.01
    seed: int = 0

    name = "gauss_newton"
    caveat = ""

    def score(self, question: Question) -> list[StageScores]:
        """See :meth:`trainer_attrib.analysis.recipes.recipe.Recipe.score`."""
        return [self._of_stage(question, stage, question.examples_of(stage, self.name)) for stage in question.stages]

    def _of_stage(self, question: Question, stage: StageReader, examples: Examples) -> StageScores:
        model, plan = question.lineage.model, scored_weights(question.lineage.model, stage)
        metric, states = training_metric(stage, plan), self.states(stage)
        total_QN = np.zeros((question.queries, len(examples)))
        for name in states:
            with standing(model, question.lineage.inside(stage, name)):
                total_QN += self._at_state(model, question.behaviors, examples, plan, metric)
        caveats = [] if metric else [UNKNOWN_STEPS.format(stage=stage.name)]
        return StageScores(described(stage, examples), (total_QN / len(states)).astype(np.float32), (*caveats,))

    def states(self, stage: StageReader) -> list[str]:
        """Names of the recorded states of a stage that are looked at."""
        recorded = [entry["name"] for entry in sorted(stage.meta["snapshots"], key=lambda e: e["step"])]
        if self.snapshots is not None:
            return list(self.snapshots)
        return [name for name in recorded if name != "start"] or recorded

    def _at_state(
        self,
        model: nn.Module,
        behaviors: Sequence[Behavior],
        examples: Examples,
        plan: SketchPlan,
        metric: TrainingMetric | None,
    ) -> np.ndarray:
        generator = torch.Generator().manual_seed(self.seed)
        projections = self.projections(model, plan, metric, examples, generator)
        scores_QN = np.zeros((sum(map(len, behaviors)), len(examples)), np.float32)
        with GradientRows(model, projections).opened() as rows:
            queries_QK = torch.stack([rows.of_query(b, q) for b in behaviors for q in range(len(b))])
            spans, chosen = [w.span for w in projections.plan.weights], self.sample
            fit = CurvatureFit(spans, queries_QK, leading=self.leading, flattened=self.flattened)
            for positions in examples.drawn(chosen, generator):
                for record in rows.of_curvature(examples, positions, generator):
                    fit.add(record.sketches)
            damping = 1 + metric.decay if metric else None
            answers_QK = fit.respond(queries_QK, min(chosen, len(examples)), damping) / -len(examples)
        projections, answers_QK = cheapest(projections, answers_QK, model)
        with GradientRows(model, projections).opened() as rows:
            for positions in progress(examples.batches(), "scoring"):
                found_QB = answers_QK @ rows.of_losses(examples, positions).T
                scores_QN[:, positions] = found_QB.float().cpu().numpy()
        return scores_QN

    def projections(
        self,
        model: nn.Module,
        plan: SketchPlan,
        metric: TrainingMetric | None,
        examples: Examples,
        generator: torch.Generator,
    ) -> Projections:
        """The coordinates of rows at the weights where the model stands, in the metric of training."""
        start = Projections(plan.of_rank(self.wide), model)
        start = start.scaled(metric.roots) if metric else start
        batches = examples.drawn(self.basis, generator)
        return captured_basis(model, start, self._of_rank(plan, start), examples, batches, generator)

    def _of_rank(self, plan: SketchPlan, like: Projections) -> SketchPlan:
        if self.rank is not None:
            return plan.of_rank(self.rank)
        usual, bytes_each = plan.of_rank(_RANK), like[plan.weights[0].name].left.element_size()
        whole = fit_whole([weight.size for weight in usual.weights], bytes_each)
        return plan.of_rank(_RANK_OF_WHOLE) if whole else usual


def cheapest(projections: Projections, vectors_QK: Tensor, model: nn.Module) -> tuple[Projections, Tensor]:
    """Projections of rows, and vectors to multiply them with: the same products for less work.

    Turning every token's factors is more work than the backward pass that they come from. Where nearly all coordinates
    are kept, it is the few vectors that are turned back, and rows are whole gradients.
    """
    plan = projections.plan
    whole = plan.of_rank(max(max(weight.rows, weight.columns) for weight in plan.weights))
    if whole.width > _LONGER * plan.width:
        return projections, vectors_QK
    return Projections(whole, model), projections.pulled_back(vectors_QK)


def scored_weights(model: nn.Module, stage: StageReader) -> SketchPlan:
    """The weights of the stage's rows that the model still has, without embeddings: most of their rows are gradients of
    tokens that an example does not have, and they were measured to make scores worse (docs/log.md)."""
    plan, modules = SketchPlan.from_dict(stage.meta["plan"]), modules_by_name(model)
    gone = {*missing_weights(model, stage)}
    kept = {w.name for w in plan.weights if not isinstance(modules.get(w.modules[0]), nn.Embedding)}
    return plan.of_weights(kept - gone or {w.name for w in plan.weights} - gone)
