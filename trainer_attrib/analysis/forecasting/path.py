"""Gradients of behaviors on the way to other weights: their mean explains the whole change, not its first slope."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from torch import nn

from trainer_attrib.analysis.behavior import Behavior
from trainer_attrib.analysis.displacement import Displacement, moved
from trainer_attrib.analysis.forecasting.reading import mean_gradient

Along = Literal["start", "path"]
"""Where a behavior's gradient is taken: at the first weights, or all along the way to the predicted ones."""
POINTS = 2
"""Of the rule of Gauss and Legendre, which is exact for behaviors of degree 2 * POINTS along the way."""


def path_slopes(model: nn.Module, behaviors: Sequence[Behavior], way: Displacement) -> list[Displacement]:
    """Gradient of each behavior's mean B, averaged over the straight way from the model's weights w to w + d.

    Times d it is B(w + d) - B(w), so that what parts of d are given adds up to the measured change (Aumann and Shapley
    1974, "Values of non-atomic games"; Sundararajan et al. 2017, "Axiomatic attribution for deep networks", equation 1,
    of weights instead of inputs). Rates are those of what the moved models say.

    Args:
        model: at w; it is put back.
        behaviors: with a gradient.
        way: d.

    Raises:
        BehaviorError: a behavior has no gradient.
    """
    nodes, weights = np.polynomial.legendre.leggauss(POINTS)
    totals: list[Displacement] = [{} for _ in behaviors]
    for part, weight in zip((nodes + 1) / 2, weights / 2, strict=True):
        with moved(model, {name: float(part) * change for name, change in way.items()}):
            for total, behavior in zip(totals, behaviors, strict=True):
                for name, gradient in mean_gradient(model, behavior).items():
                    total[name] = total.get(name, 0.0) + float(weight) * gradient
    return totals
