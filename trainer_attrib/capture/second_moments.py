"""When the second moments are folded into the projections, and their factors for every sketched weight."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from trainer_attrib.capture.optimizer_tap import correction_unavailable, second_moment
from trainer_attrib.numerics.second_moment import factor
from trainer_attrib.tap.plan import SketchPlan, WeightPlan
from trainer_attrib.tap.projections import Factors
from trainer_attrib.types import Correction

FIRST, GROWTH = (
    4,
    3,
)  # refreshed after steps 4, 12, 36, 108, ...: few versions, each at most 3x as old as when it was new


class SecondMoments:
    """The factored second moments of one optimizer; ``unavailable`` says why there are none, if there are none."""

    def __init__(
        self, plan: SketchPlan, optimizer: Optimizer, parameters: dict[str, nn.Parameter], correction: str
    ) -> None:
        self._plan, self._optimizer, self._parameters = plan, optimizer, parameters
        wanted = correction == Correction.FACTORED
        self.unavailable = correction_unavailable(optimizer) if wanted else ""
        self._next = FIRST if wanted and not self.unavailable else None

    def due(self, step: int) -> bool:
        """Whether a new version is to be made after this step; says so once per version."""
        if self._next is None or step < self._next:
            return False
        self._next *= GROWTH
        return True

    def factors(self) -> Factors:
        """Row and column means of the bias-corrected second moments, for the weights that were updated already."""
        found = {weight.name: self._extended(weight) for weight in self._plan.weights}
        return {name: factor(moment) for name, moment in found.items() if moment is not None}

    def _extended(self, weight: WeightPlan) -> Tensor | None:
        """A weight's second moment with its bias's appended, as the sketch sees them."""
        moment = second_moment(self._optimizer, self._parameters[weight.name])
        if moment is None or not weight.bias:
            return moment
        bias = second_moment(self._optimizer, self._parameters[weight.bias])
        return None if bias is None else torch.cat([moment, bias.unsqueeze(weight.bias_axis)], dim=weight.bias_axis)
