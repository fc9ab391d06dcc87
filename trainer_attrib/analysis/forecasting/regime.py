"""How far a run moves its model: does its loss fall as a straight line would, or does it saturate?"""

from __future__ import annotations

import torch

from trainer_attrib.analysis.displacement import Displacement, moved
from trainer_attrib.analysis.effects.slopes import inner
from trainer_attrib.analysis.forecasting.prediction import Prediction, View
from trainer_attrib.analysis.rates import RateMeasure

LAZY, STRONG = 0.9, 0.6
"""Fall of the loss as a share of what its first slope promises: above the first, gradients stay what they were; below
the second, most of the push is gone before the run ends. For DPO they are margins of about 0.4 and 1.9 (times beta)."""
FAR, VERY_FAR = 0.1, 0.35
"""Predicted changes of a rate from which on the model is moved far: straight lines end before a rate does."""


def regime_of(view: View, found: Prediction) -> tuple[str, str]:
    """ "lazy", "moderate" or "strong", and what to think of it, by a prediction that moves the weights. The fall of the
    loss is measured on a few of the run's own batches.

    Args:
        view: inside the run's ``undisturbed()``.
        found: with a displacement.
    """
    displacement, sampled = found.displacement or {}, view.gradients
    promised = -float(inner(sampled.sample_slope, displacement))
    fall = sampled.sample_loss - _loss(view, displacement)
    if promised <= 0:
        return "strong", "the predicted step does not lower the run's loss: the forecast is not to be relied on"
    share = fall / promised
    pairs = zip(view.behaviors, found.changes, strict=True)
    rates = max((abs(r.change) for b, r in pairs if isinstance(b.measure, RateMeasure)), default=0.0)
    how = f"the run's loss falls by {share:.0%} of what its first slope promises"
    how += f", rates change by up to {rates:.2f}" if rates else ""
    if share >= LAZY and rates <= FAR:
        return "lazy", ""
    if share >= STRONG and rates <= VERY_FAR:
        return "moderate", f"moderate regime: {how}"
    return "strong", f"strong regime: {how}; frozen gradients may overshoot: compare method='linearised'"


def _loss(view: View, displacement: Displacement) -> float:
    with torch.no_grad(), moved(view.model, displacement):
        return sum(float(loss()) for step in view.gradients.sample for loss in step.losses)
