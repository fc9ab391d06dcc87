"""What each example adds to the predicted change of each behavior."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from trainer_attrib.analysis.displacement import Displacement
from trainer_attrib.analysis.effects.slopes import inner
from trainer_attrib.analysis.forecasting.path import Along
from trainer_attrib.analysis.forecasting.prediction import View
from trainer_attrib.analysis.forecasting.results import Contributions
from trainer_attrib.progress import progress
from trainer_attrib.tap.names import parameters_by_name

APART = 0.2
"""Share by which contributions may miss what the batches say before that is said."""
MEANING: dict[Along, str] = {
    "start": "contributions are first-order: they add up to the linear prediction, not to the measured one",
    "path": "contributions are averages over the way to the weights of warm: they add up to its measured prediction",
}
"""What contributions add up to."""


def contributions(view: View, chosen: Sequence[int], along: Along = "start") -> Contributions:
    """Contributions of all N examples to some behaviors: minus the gradient of the example's loss, in the metric of the
    optimizer's warm jump, times the behavior's gradient, over N (Pruthi et al. 2020, "Estimating training data
    influence by tracing gradient descent", equation 1, with the whole run as one step). Where training clips, an
    example counts for what is left of the steps that hold it: one with a large gradient shrinks its own step. One
    forward and backward pass of each example alone, however many behaviors.

    Args:
        view: inside the run's ``undisturbed()``.
        chosen: numbers of behaviors.
        along: where behaviors' gradients are taken, see :func:`~trainer_attrib.analysis.forecasting.path.path_slopes`.

    Raises:
        BehaviorError: a behavior has no gradient.
        ConfigurationError: the run's examples cannot be listed.
    """
    rows, gradients = view.run.rows(), view.gradients
    places = {name: place for name, place in parameters_by_name(view.model).items() if name in gradients.mean}
    slopes = view.slopes(chosen, along)
    directions = _Directions.of(view, slopes, places, len(rows))
    values, squares = np.zeros((len(chosen), len(rows))), torch.zeros(len(rows), dtype=torch.float64)
    for number in progress(range(len(rows)), "contributions"):
        found = torch.autograd.grad(view.run.example_loss(number), list(places.values()), allow_unused=True)
        pairs = zip(places, found, strict=True)
        dots = [directions.dots(name, gradient) for name, gradient in pairs if gradient is not None]
        values[:, number] = -torch.stack(dots).sum(0).numpy() / len(rows)
        squares[number] = sum(float(gradient.double().square().sum()) for gradient in found if gradient is not None)
    values *= gradients.clipping.of_examples(squares, view.run.batch_size).numpy()
    names = tuple(view.behaviors[number].name for number in chosen)
    caveats = [MEANING[along]]
    for name, row, slope in zip(names, values, slopes, strict=True):
        line = float(inner(slope, gradients.warm))
        if abs(row.sum() - line) > APART * abs(line):
            caveats.append(
                f"'{name}': contributions add up to {row.sum():+.4f}, the batches to "
                f"{line:+.4f}: part of them was looked at, or clipping hid more than is made up for"
            )
    return Contributions(names, tuple(rows), values, tuple(caveats))


@dataclass(frozen=True)
class _Directions:
    """What an example's gradient is multiplied by, on the devices of the weights.

    Args:
        slopes: of K behaviors, [K, ...] by weight; times the metric where all batches were looked at.
        rates: sums of the learning rates by weight.
        squares: mean squares of the batches' gradients, only where part of the batches was looked at: an example may
            not be among them, and a weight that only it moves has none.
        epsilon: of the optimizer.
        visits: by how much an example's own square is divided in the mean square of all batches: its own are 1 in
            N / B of them, in which it is a part of 1 / B.
    """

    slopes: Mapping[str, Tensor]
    rates: Mapping[str, float]
    squares: Mapping[str, Tensor]
    epsilon: float
    visits: int

    @staticmethod
    def of(view: View, slopes: Sequence[Displacement], places: Mapping[str, Tensor], examples: int) -> _Directions:
        """Of behaviors with these gradients."""
        found, squares = view.gradients, dict[str, Tensor]()
        metric = found.metric
        if found.share < 1 and found.epsilon is not None:
            metric = {name: torch.ones_like(value) for name, value in metric.items()}
            squares = {name: found.square[name].to(place) for name, place in places.items()}
        scaled = {
            name: torch.stack([slope[name] * metric[name] for slope in slopes]).to(place)
            for name, place in places.items()
        }
        return _Directions(scaled, found.rates, squares, found.epsilon or 0.0, examples * view.run.batch_size)

    def dots(self, name: str, gradient: Tensor) -> Tensor:
        """Inner products of one example's gradient of a weight, in the optimizer's metric, with K slopes, float64 [K]
        on the CPU."""
        if self.squares:
            square = self.squares[name] + gradient.square() / self.visits
            gradient = torch.where(square > 0, self.rates[name] / (square.sqrt() + self.epsilon), 0.0) * gradient
        return (self.slopes[name].flatten(1) @ gradient.flatten()).double().cpu()
