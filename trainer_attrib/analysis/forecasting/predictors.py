"""Predictors that follow the optimizer: where would the run take the weights, and what would the model do there?"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from trainer_attrib.analysis.displacement import Displacement
from trainer_attrib.analysis.effects.slopes import inner
from trainer_attrib.analysis.forecasting.arms import Arm
from trainer_attrib.analysis.forecasting.linearised import linearised_outputs
from trainer_attrib.analysis.forecasting.prediction import Prediction, View
from trainer_attrib.analysis.forecasting.reading import Reading
from trainer_attrib.analysis.training_state import TrainingState, buffers_kept, standing, state_of
from trainer_attrib.errors import ConfigurationError
from trainer_attrib.tap.names import parameters_by_name


@dataclass(frozen=True)
class Frozen:
    """Gradients stay what they are at the first weights; the optimizer steps along them in the run's own order, with
    its schedule, clipping and decay; the weights jump to where that ends, and the behavior is measured there.

    With a share of the batches, each stands for those up to the next.
    """

    name = "frozen"
    caveat = ""

    def predict(self, view: View) -> Prediction:
        """See :meth:`trainer_attrib.analysis.forecasting.prediction.Predictor.predict`."""
        found = view.gradients
        return Prediction(view.frozen, found.moved, found.share)


@dataclass(frozen=True)
class Warm:
    """One jump by minus the sum of the learning rates times the mean gradient over the root of the mean square, as an
    optimizer of Adam's kind makes it whose moments are warm from the beginning; then measured. It does not depend on
    the order of the data."""

    name = "warm"
    caveat = ""

    def predict(self, view: View) -> Prediction:
        """See :meth:`trainer_attrib.analysis.forecasting.prediction.Predictor.predict`."""
        found = view.gradients
        return Prediction(view.warm, found.warm, found.share)


@dataclass(frozen=True)
class GradientDot:
    """The behavior's gradient times the warm jump: not measured at the moved weights, but extrapolated in a straight
    line from the first ones. Rates saturate, straight lines do not."""

    name = "gradient"
    caveat = "gradient extrapolates behaviors in a straight line: it goes wrong where they change a lot"

    def predict(self, view: View) -> Prediction:
        """See :meth:`trainer_attrib.analysis.forecasting.prediction.Predictor.predict`."""
        found = view.gradients
        jump = found.warm
        dots = [float(inner(view.slope(number), jump)) for number in range(len(view.behaviors))]
        return Prediction([Reading(dot, 0.0, "linear") for dot in dots], None, found.share)


@dataclass(frozen=True)
class Linearised:
    """As ``frozen``, with the model's outputs refreshed to first order before every step (a forward pass more), so that
    pairs that are already told apart push less, as in training. For runs that move the model far.

    Needs a loss that is computed from the model's outputs outside of it, as those of TRL's preference trainers are.
    """

    name = "linearised"
    caveat = ""

    def predict(self, view: View) -> Prediction:
        """See :meth:`trainer_attrib.analysis.forecasting.prediction.Predictor.predict`."""
        with buffers_kept(view.model):
            displacement, taken = _linearised(view)
        changes = view.readings.of(displacement)
        cost = 4 / 3 * taken / len(view.run.rates)
        return Prediction(changes, displacement, cost)


@dataclass(frozen=True)
class LookAhead:
    """The run's first steps, really taken, and their displacement scaled by the sums of the learning rates; the weights
    are put back.

    Args:
        part: of the run's steps.
    """

    part: float = 0.25

    name = "look_ahead"
    caveat = "look_ahead scales the first steps: what the schedule and the data bring later is not in it"

    def predict(self, view: View) -> Prediction:
        """See :meth:`trainer_attrib.analysis.forecasting.prediction.Predictor.predict`."""
        sums = list(itertools.accumulate(sum(row) for row in view.run.rates))
        count = max(1, round(self.part * len(sums)))
        count = next((taken for taken in range(count, len(sums)) if sums[taken - 1] > 0), len(sums))  # after a warmup
        start = state_of(view.model)
        with standing(view.model, start):
            _train(view, count)
            reached = state_of(view.model)
        moved = _scaled(start, reached, sums[-1] / sums[count - 1] if sums[count - 1] else 1.0)
        changes = view.readings.of(moved)
        return Prediction(changes, moved, count / len(sums))


def _linearised(view: View) -> tuple[Displacement, int]:
    """Where the run leads in the linearised model, and how many steps were differentiated."""
    steps = view.run.steps
    places = parameters_by_name(view.model)
    arm = Arm(steps.optimizer(), {id(place): name for name, place in places.items()})
    every = max(1, round(1 / view.share))
    taken = 0
    for first, step in zip(range(len(view.run.rates)), steps.steps(), strict=False):
        if first % every:
            continue
        taken += 1
        view.model.zero_grad(set_to_none=True)
        with linearised_outputs(view.model, arm.displacement()) as refreshed:
            for loss in step.losses:
                loss().backward()
        if not refreshed:
            raise _computed_inside(type(view.model).__name__)
        steps.clip()
        arm.step(_gradients(places), view.run.rates[first : first + every])
        view.model.zero_grad(set_to_none=True)
    return arm.end(), taken


def _train(view: View, count: int) -> None:
    steps = view.run.steps
    optimizer = steps.optimizer()
    for rates, step in zip(view.run.rates[:count], steps.steps(), strict=False):
        optimizer.zero_grad()
        for loss in step.losses:
            loss().backward()
        steps.clip()
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        optimizer.step()
    optimizer.zero_grad()


def _scaled(start: TrainingState, reached: TrainingState, factor: float) -> Displacement:
    pairs = ((name, value, reached.weights[name]) for name, value in start.weights.items())
    return {name: factor * (b.double() - a.double()) for name, a, b in pairs if not torch.equal(a, b)}


def _gradients(places: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: place.grad.detach().clone() for name, place in places.items() if place.grad is not None}


def _computed_inside(model: str) -> ConfigurationError:
    return ConfigurationError(
        f"The run's loss is not computed from outputs of {model} that could be refreshed.",
        cause="the model computes the loss itself, as transformers' models do from labels.",
        fix="use method='frozen'.",
    )
