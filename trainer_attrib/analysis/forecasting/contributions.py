"""What each example adds to the predicted change of each behavior."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from trainer_attrib.analysis.effects.slopes import inner
from trainer_attrib.analysis.forecasting.prediction import View
from trainer_attrib.analysis.forecasting.results import Contributions
from trainer_attrib.progress import progress
from trainer_attrib.tap.names import parameters_by_name

APART = 0.2
"""Share by which contributions may miss the straight line of the batches before that is said."""


def contributions(view: View, chosen: Sequence[int]) -> Contributions:
    """First-order contributions of all N examples to some behaviors: minus the gradient of the example's loss, in the
    metric of the optimizer's warm jump, times the behavior's gradient, over N (Pruthi et al. 2020, "Estimating training
    data influence by tracing gradient descent", equation 1, with the whole run as one step). Where training clips, an
    example counts for what is left of the steps that hold it: one with a large gradient shrinks its own step. One
    forward and backward pass of each example alone, however many behaviors.

    Args:
        view: inside the run's ``undisturbed()``.
        chosen: numbers of behaviors.

    Raises:
        BehaviorError: a behavior has no gradient.
        ConfigurationError: the run's examples cannot be listed.
    """
    rows, gradients = view.run.rows(), view.gradients
    places = {name: place for name, place in parameters_by_name(view.model).items() if name in gradients.mean}
    slopes = {name: torch.stack([view.slope(number)[name] for number in chosen]).to(place.dtype)
              for name, place in places.items()}  # fmt: skip
    values, squares = np.zeros((len(chosen), len(rows))), torch.zeros(len(rows), dtype=torch.float64)
    for number in progress(range(len(rows)), "contributions"):
        found = torch.autograd.grad(view.run.example_loss(number), list(places.values()), allow_unused=True)
        dots = [
            _dots(slopes[name], gradients.of_example(name, gradient, len(rows), view.run.batch_size))
            for name, gradient in zip(places, found, strict=True)
            if gradient is not None
        ]
        values[:, number] = -torch.stack(dots).sum(0).numpy() / len(rows)
        squares[number] = sum(float(gradient.double().square().sum()) for gradient in found if gradient is not None)
    values *= gradients.clipping.of_examples(squares, view.run.batch_size).numpy()
    names = tuple(view.behaviors[number].name for number in chosen)
    caveats = ["contributions are first-order: they add up to the linear prediction, not to the measured one"]
    for row, number in zip(values, chosen, strict=True):
        line = float(inner(view.slope(number), gradients.warm))
        if abs(row.sum() - line) > APART * abs(line):
            caveats.append(
                f"'{view.behaviors[number].name}': contributions add up to {row.sum():+.4f}, the batches to "
                f"{line:+.4f}: part of them was looked at, or clipping hid more than is made up for"
            )
    return Contributions(names, tuple(rows), values, tuple(caveats))


def _dots(slopes_K: Tensor, jump: Tensor) -> Tensor:
    """Inner products with K slopes, float64 [K]."""
    return (slopes_K.flatten(1) @ jump.flatten()).double()
