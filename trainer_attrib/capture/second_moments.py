"""When the second moments are folded into the projections, and their factors for every sketched weight."""

from __future__ import annotations

from torch import Tensor, nn
from torch.optim import Optimizer

from trainer_attrib.capture.moment_readers import Factored, correction_unavailable, second_moment
from trainer_attrib.numerics.second_moment import append_bias, factor
from trainer_attrib.numerics.sketching import as_matrix
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
        """Whether a new version is to be made after this step."""
        return self._next is not None and step >= self._next

    def catch_up(self, step: int) -> None:
        """Plan the next version after this step, as if all before it had been made."""
        while self._next is not None and self._next <= step:
            self._next *= GROWTH

    def factors(self) -> Factors:
        """Row and column means of the second moments, for the weights that were updated already; {} for none yet.

        A state that is not what its optimizer's reader expects ends the correction: ``unavailable`` says why.
        """
        try:
            found = {weight.name: self._factors(weight) for weight in self._plan.weights}
        except KeyError as missing:
            name = type(self._optimizer).__name__
            self.unavailable = f"{name}'s state has no {missing}; rows are raw gradients from here on"
            self._next = None
            return {}
        known = {name: factors for name, factors in found.items() if factors is not None}
        if known and self._next is not None:
            self._next *= GROWTH
        return known

    def _factors(self, weight: WeightPlan) -> tuple[Tensor, Tensor] | None:
        """A weight's row and column means with its bias's appended, as the sketch sees them."""
        moment = second_moment(self._optimizer, self._parameters[weight.name])
        if moment is None:
            return None
        means = (moment.rows, moment.columns) if isinstance(moment, Factored) else factor(as_matrix(moment))
        if not weight.bias:
            return means
        bias = second_moment(self._optimizer, self._parameters[weight.bias])
        assert not isinstance(bias, Factored)  # a vector
        return None if bias is None else append_bias(*means, bias, weight.bias_axis)
