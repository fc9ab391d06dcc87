"""What training on given examples did to their own losses, and what these would be without it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trainer_attrib.analysis.behavior import evaluating
from trainer_attrib.analysis.effects.lineage import Lineage
from trainer_attrib.analysis.examples import Examples
from trainer_attrib.analysis.gradient_rows import GradientRows
from trainer_attrib.analysis.recipes.gauss_newton import UNKNOWN_STEPS, GaussNewton, scored_weights
from trainer_attrib.analysis.recipes.training_metric import TrainingMetric, training_metric
from trainer_attrib.analysis.training_state import standing
from trainer_attrib.ledger.reader import StageReader
from trainer_attrib.numerics.curvature_fit import CurvatureFit
from trainer_attrib.numerics.leaving_out import LeavingOut
from trainer_attrib.progress import progress
from trainer_attrib.tap.plan import SketchPlan

AT_THE_END = GaussNewton(snapshots=("end",))


@dataclass(frozen=True)
class OwnLosses:
    """Of given examples, in the order given, in the unit of their losses, mean over states: float64 [N].

    Args:
        loss: that the model has.
        lowered: by how much training on an example changed its loss, to first order.
        left_out: approximate loss had training left the example out.
        states: that were looked at.
        caveats: what was assumed.
    """

    loss: Tensor
    lowered: Tensor
    left_out: Tensor
    states: int
    caveats: tuple[str, ...]


@dataclass(frozen=True)
class OwnLossMetric:
    """What of :class:`OwnLosses` is an example's self-influence.

    Args:
        name: of the metric.
        of: the score of each example, [N].
        curvature: which states are looked at, and how curvature is fitted.
    """

    name: str
    of: Callable[[OwnLosses], Tensor]
    curvature: GaussNewton


def self_gauss_newton(curvature: GaussNewton = AT_THE_END) -> OwnLossMetric:
    """By how much training on an example lowered its own loss, to first order.

    g^T P^(1/2) (P^(1/2) G P^(1/2) + decay + 1)^(-1) P^(1/2) g / N is the influence of :class:`GaussNewton` with the
    example for the query (Koh & Liang 2017, "Understanding black-box predictions via influence functions", section
    5.4).
    """
    return OwnLossMetric("gauss_newton", lambda found: found.lowered, curvature)


def leave_one_out(curvature: GaussNewton = AT_THE_END) -> OwnLossMetric:
    """The loss that the model would have of an example that it had not been trained on: one Newton step on the loss of
    the others, in the metric of :class:`GaussNewton`, and the quadratic model of the example's own loss there.

    The step is g^T (A - C)^(-1) g rather than g^T A^(-1) g, C being the example's part of the curvature: where an
    example is what holds the weights in place (its leverage is large), leaving it out moves them further. For least
    squares and ridge regression the result is the leave-one-out loss exactly (tests).
    """
    return OwnLossMetric("leave_one_out", lambda found: found.left_out, curvature)


def own_losses(lineage: Lineage, stage: StageReader, examples: Examples, settings: GaussNewton) -> OwnLosses:
    """Losses of a stage's examples with and without their own part in training.

    Args:
        lineage: of the model.
        stage: that trained on the examples.
        examples: all that it trained on; the others are what holds the weights in place.
        settings: see :class:`GaussNewton`.

    Raises:
        StageNotFoundError: no such snapshot.
    """
    model, plan = lineage.model, scored_weights(lineage.model, stage)
    metric, states = training_metric(stage, plan), settings.states(stage)
    total_3N = torch.zeros(3, len(examples), dtype=torch.float64)
    for name in states:
        with standing(model, lineage.inside(stage, name)):
            total_3N += _AtState(model, examples, plan, metric, settings).found()
    caveats = () if metric else (UNKNOWN_STEPS.format(stage=stage.name),)
    loss_N, lowered_N, left_out_N = total_3N / len(states)
    return OwnLosses(loss_N, lowered_N, left_out_N, len(states), caveats)


@dataclass(frozen=True)
class _AtState:
    """One recorded state, where the model stands."""

    model: nn.Module
    examples: Examples
    plan: SketchPlan
    metric: TrainingMetric | None
    settings: GaussNewton

    def found(self) -> Tensor:
        """Loss, change of the loss, loss without the example: [3, N]."""
        examples, generator = self.examples, torch.Generator().manual_seed(self.settings.seed)
        projections = self.settings.projections(self.model, self.plan, self.metric, examples, generator)
        found_3N = torch.zeros(3, len(examples), dtype=torch.float64)
        with GradientRows(self.model, projections).opened() as rows:
            fitted, state = examples.drawn(self.settings.sample, generator), generator.get_state()
            fit = self._fitted(rows, projections.plan, fitted, generator)
            damping = 1 + self.metric.decay if self.metric else None
            others = LeavingOut(fit, sum(map(len, fitted)), damping)
            generator.set_state(state)  # the predictions that are drawn again are those that are in the fit
            for positions, inside in progress([*self._batches(fitted)], "leaving out"):
                own_NCK = self._own(rows, positions, generator)
                gradients_NK = rows.of_losses(examples, positions)
                without_NK = others.respond_without(gradients_NK, own_NCK * inside) / len(examples)
                moved_NC = (own_NCK @ without_NK[:, :, None])[..., 0]
                rise_N = (gradients_NK * without_NK).sum(1) + 0.5 * moved_NC.square().sum(1)
                lowered_N = (gradients_NK * others.respond(gradients_NK)).sum(1) / len(examples)
                found_3N[1, positions], found_3N[2, positions] = lowered_N.double().cpu(), rise_N.double().cpu()
        with evaluating(self.model), torch.no_grad():
            for positions in examples.batches():
                found_3N[0, positions] = examples.loss(self.model, examples.items(positions)).double().cpu()
        found_3N[2] += found_3N[0]
        return found_3N

    def _fitted(
        self, rows: GradientRows, plan: SketchPlan, batches: Sequence[list[int]], generator: torch.Generator
    ) -> CurvatureFit:
        fit = None
        for positions in batches:
            for record in rows.of_curvature(self.examples, positions, generator):
                fit = fit or CurvatureFit([weight.span for weight in plan.weights], record.sketches)
                fit.add(record.sketches)
        assert fit is not None, "there are no empty examples"
        return fit

    def _batches(self, fitted: Sequence[list[int]]) -> Iterator[tuple[list[int], float]]:
        """Those in the fit with 1, then the others with 0."""
        yield from ((positions, 1.0) for positions in fitted)
        known, size = {position for positions in fitted for position in positions}, self.examples.batch_size
        rest = [position for batch in self.examples.batches() for position in batch if position not in known]
        yield from ((rest[first : first + size], 0.0) for first in range(0, len(rest), size))

    def _own(self, rows: GradientRows, positions: Sequence[int], generator: torch.Generator) -> Tensor:
        """The rows whose outer products are the curvature of each example's loss, [N, C, K]."""
        records = rows.of_curvature(self.examples, positions, generator)
        return torch.stack([record.sketches for record in records], dim=1)
