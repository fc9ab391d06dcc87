"""The gradient of a whole batch at a shadow's weights, from that of a part of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

MEMORY = 0.9
"""What a step leaves of the sums over the steps before it: about ten steps count."""


@dataclass(frozen=True)
class Compared:
    """Gradients of a part of a step's batch, by weight.

    Args:
        factual: at the model's weights.
        shadow: at the shadow's.
    """

    factual: dict[str, Tensor]
    shadow: dict[str, Tensor]

    def times(self, factor: float) -> Compared:
        """Both multiplied."""
        if factor == 1.0:
            return self
        return Compared(*({name: g * factor for name, g in of.items()} for of in (self.factual, self.shadow)))


@dataclass
class Control:
    """A control variate (Owen 2013, "Monte Carlo theory, methods and examples", section 8.9), its coefficient learned
    while training runs.

    The part errs by e = (its gradient at the model's weights) - (the whole batch's there), whose mean over parts is 0.
    For the shadow's weights s, gradient_part(s) - c e has that of the whole batch as its mean for any c, and the least
    variance for c = cov(gradient_part(s), e) / var(e): 1 while model and shadow are close, 0 when their gradients have
    nothing in common. All weights share one c, from sums over the last steps.
    """

    sums: dict[str, Tensor] = field(
        default_factory=lambda: {"covariance": torch.zeros(()), "variance": torch.zeros(())}
    )

    @property
    def coefficient(self) -> Tensor:
        """From 0 to 1, 0-dim; 1 where the part never erred."""
        covariance, variance = self.sums["covariance"], self.sums["variance"]
        return torch.where(variance > 0, (covariance / variance).clamp(0.0, 1.0), 1.0)

    def applied(self, part: Compared, whole: Mapping[str, Tensor], *, learn: bool) -> dict[str, Tensor]:
        """The whole batch's gradient at the shadow's weights. A weight that the part says nothing of has the model's.

        Args:
            part: gradients of a part, as large as those of a whole batch.
            whole: the batch's gradient at the model's weights, by weight.
            learn: whether the part is one of this very batch, so that it tells of the coefficient.
        """
        told = [name for name in whole if name in part.factual or name in part.shadow]
        errors = {name: part.factual[name] - whole[name] if name in part.factual else -whole[name] for name in told}
        if learn:
            self._learn(part.shadow, errors)
        coefficient = self.coefficient
        taken_out = {name: coefficient.to(error) * error for name, error in errors.items()}
        found = {name: part.shadow[name] - e if name in part.shadow else -e for name, e in taken_out.items()}
        return {**whole, **found}

    def _learn(self, shadow: Mapping[str, Tensor], errors: Mapping[str, Tensor]) -> None:
        for key, other in (("covariance", shadow), ("variance", errors)):
            products = [(other[name] * error).sum() for name, error in errors.items() if name in other]
            self.sums[key] = MEMORY * self.sums[key] + sum(p.to(products[0]) for p in products)
