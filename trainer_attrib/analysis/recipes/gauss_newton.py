"""Influence functions with the curvature of the loss, damped by how far training went.

Rows are gradients in the eigenbasis of K-FAC's factors, where curvature is nearly diagonal (George et al. 2018,
"EK-FAC"; Grosse et al. 2023, "Studying large language model generalization with influence functions"); in small models
every layer's block is fitted whole. All is measured in the metric of training, so that there is no damping to choose.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm

from trainer_attrib.analysis.examples import Examples
from trainer_attrib.analysis.gradient_rows import GradientRows
from trainer_attrib.analysis.query_sketches import missing_weights
from trainer_attrib.analysis.recipes.captured_basis import captured_basis
from trainer_attrib.analysis.recipes.recipe import Question, StageScores
from trainer_attrib.analysis.recipes.training_metric import TrainingMetric, training_metric
from trainer_attrib.analysis.results import InfluenceExamples
from trainer_attrib.ledger.reader import StageReader
from trainer_attrib.numerics.curvature_fit import CurvatureFit
from trainer_attrib.tap.plan import SketchPlan
from trainer_attrib.tap.projections import Projections


@dataclass(frozen=True)
class GaussNewton:
    """-q^T P^(1/2) (P^(1/2) G P^(1/2) + decay + 1)^(-1) P^(1/2) g / N: by how much training on an example changed a
    behavior with gradient q, in its unit, to first order.

    G is the Gauss-Newton matrix of the mean loss, g the example's gradient, P how far training moved a weight per unit
    of gradient. One pass over the data for curvature, one for scores, and one over a part of it for the coordinates.

    Args:
        rank: coordinates kept on each side of a weight.
        wide: coordinates on each side among which they are looked for; longer sides are projected at random first.
        basis: how many examples the coordinates are fitted to.
        seed: of the predictions drawn for the curvature, and of the examples for the coordinates.
    """

    rank: int = 32
    wide: int = 1024
    basis: int = 512
    seed: int = 0

    name = "gauss_newton"
    caveat = "gauss_newton is of the weights at the end: what an example did to the path of training is not in it"

    def score(self, question: Question) -> list[StageScores]:
        """See :meth:`trainer_attrib.analysis.recipes.recipe.Recipe.score`."""
        return [self._score(question, stage, question.examples_of(stage, self.name)) for stage in question.stages]

    def _score(self, question: Question, stage: StageReader, examples: Examples) -> StageScores:
        model, generator = question.lineage.model, torch.Generator().manual_seed(self.seed)
        plan, metric = _plan(model, stage), None
        metric = training_metric(stage, plan)
        projections = self._projections(model, plan, metric, examples, generator)
        with GradientRows(model, projections).opened() as rows:
            queries_QK = torch.stack([rows.of_query(b, q) for b in question.behaviors for q in range(len(b))])
            fit = CurvatureFit([w.span for w in projections.plan.weights], queries_QK)
            for positions in _progress(examples, f"curvature of {stage.name}"):
                for record in rows.of_curvature(examples, positions, generator):
                    fit.add(record.sketches)
            decay = metric.decay if metric else 0.0
            answers_QK = fit.respond(queries_QK, len(examples), decay) / len(examples)
            scores_QN = np.zeros((len(answers_QK), len(examples)), np.float32)
            for positions in _progress(examples, f"scoring {stage.name}"):
                found_QB = -answers_QK @ rows.of_losses(examples, positions).T
                scores_QN[:, positions] = found_QB.float().cpu().numpy()
        return StageScores(_described(stage, examples), scores_QN, ())

    def _projections(
        self,
        model: nn.Module,
        plan: SketchPlan,
        metric: TrainingMetric | None,
        examples: Examples,
        generator: torch.Generator,
    ) -> Projections:
        start = Projections(plan.of_rank(self.wide), model)
        start = start.scaled(metric.roots) if metric else start
        chosen = torch.randperm(len(examples), generator=generator)[: self.basis].tolist()
        batches = [chosen[i : i + examples.batch_size] for i in range(0, len(chosen), examples.batch_size)]
        return captured_basis(model, start, plan.of_rank(self.rank), examples, batches, generator)


def _plan(model: nn.Module, stage: StageReader) -> SketchPlan:
    """The weights of the stage's rows that the model still has, without embeddings."""
    plan, gone = SketchPlan.from_dict(stage.meta["plan"]), set(missing_weights(model, stage))
    return plan.of_weights({w.name for w in plan.weights} - gone)


def _progress(examples: Examples, title: str) -> Iterator[list[int]]:
    batches = examples.batches()
    yield from tqdm(batches, desc=title, leave=False, disable=None)


def _described(stage: StageReader, examples: Examples) -> InfluenceExamples:
    ids = np.array(examples.ids, dtype=object)
    names = np.array([stage.name] * len(ids), dtype=object)
    return InfluenceExamples(names, ids, np.zeros(len(ids), np.int64), examples.sources, examples.texts)
