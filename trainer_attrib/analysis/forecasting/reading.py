"""Reading off a model whose weights were moved what that changed: each behavior measured, not extrapolated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trainer_attrib.analysis.behavior import Behavior, evaluating
from trainer_attrib.analysis.curvature import gradients_of
from trainer_attrib.analysis.displacement import Displacement, moved
from trainer_attrib.analysis.rates import Drawn, Generations, RateMeasure
from trainer_attrib.errors import BehaviorError
from trainer_attrib.tap.names import parameters_by_name

ENOUGH = 0.6
"""Effective sample size, as a share of the samples, down to which samples are re-weighted instead of drawn anew."""


@dataclass(frozen=True)
class Reading:
    """Change of a behavior's mean over its queries.

    Args:
        change: moved minus unmoved, in the behavior's unit.
        standard_error: of the change, over queries and samples: what other prompts and samples would have given.
        how: "measured", "re-weighted" or "drawn anew".
        effective: size of the re-weighted sample as a share of its own, 1 where nothing is re-weighted.
    """

    change: float
    standard_error: float
    how: str
    effective: float = 1.0


class Readings:
    """Behaviors of one model at its own weights, and what displacements change about them.

    Generations are drawn once from the model and re-weighted by how much likelier the moved model finds them
    (self-normalised importance sampling, Owen 2013, "Monte Carlo theory, methods and examples", section 9.2) while that
    leaves an effective sample of at least 60 %; else they are drawn from the moved model by the same seed.
    """

    def __init__(self, model: nn.Module, behaviors: Sequence[Behavior]) -> None:
        self._model, self._behaviors = model, behaviors
        with evaluating(model):
            self._drawn = [None if rate is None else _said(model, rate.generations) for rate in map(rate_of, behaviors)]
        self.before: list[Tensor] = [behavior.values(model) for behavior in behaviors]

    def means(self) -> list[float]:
        """Of every behavior, at the model's own weights."""
        return [float(values.mean()) for values in self.before]

    def of(self, displacement: Displacement) -> list[Reading]:
        """What moving the weights changes about every behavior."""
        with moved(self._model, displacement), evaluating(self._model), torch.no_grad():
            return [
                self._measured(number) if said is None else self._rate(number, *said)
                for number, said in enumerate(self._drawn)
            ]

    def _measured(self, number: int, how: str = "measured", effective: float = 1.0) -> Reading:
        changes = self._behaviors[number].values(self._model) - self.before[number]
        return Reading(float(changes.mean()), _standard_error(changes), how, effective)

    def _rate(self, number: int, drawn: Drawn, logprobs_M: Tensor) -> Reading:
        measure = rate_of(self._behaviors[number])
        assert measure is not None
        generations, places = measure.generations, measure.places(drawn)
        values = drawn.detected(measure.detector, generations.prompts)[places]
        weights = (generations.logprobs(self._model, drawn) - logprobs_M)[places].exp()
        effective = float(weights.sum() ** 2 / (len(weights) * weights.square().sum()))
        if not effective >= ENOUGH:
            return self._measured(number, "drawn anew", effective)
        relative = weights / weights.mean()
        after, mean = float((relative * values).mean()), float(values.mean())
        return Reading(after - mean, _standard_error(relative * (values - after) - values), "re-weighted", effective)


def mean_gradient(model: nn.Module, behavior: Behavior) -> Displacement:
    """Gradient of a behavior's mean over its queries, with respect to the weights that train.

    Raises:
        BehaviorError: the measure has no gradient.
    """
    places = {name: place for name, place in parameters_by_name(model).items() if place.requires_grad}
    parameters, total = list(places.values()), [torch.zeros_like(p) for p in places.values()]
    with evaluating(model), gradients_of(parameters), torch.enable_grad():
        for first in behavior.batches():
            values = behavior.values_from(model, first)
            if not values.requires_grad:
                raise BehaviorError(
                    f"Behavior '{behavior.name}' has no gradient.",
                    cause="its measure detaches or rounds.",
                    fix="ask for its forecast alone: contributions and reshaping need a gradient.",
                )
            found = torch.autograd.grad(values.sum(), parameters, allow_unused=True)
            for one, gradient in zip(total, found, strict=True):
                if gradient is not None:
                    one += gradient
    return {name: one.double().cpu() / len(behavior) for name, one in zip(places, total, strict=True)}


def rate_of(behavior: Behavior) -> RateMeasure | None:
    """Its measure, if it is a rate of sampled generations."""
    measure: Any = behavior.measure
    return measure if isinstance(measure, RateMeasure) else None


def _said(model: nn.Module, generations: Generations) -> tuple[Drawn, Tensor]:
    """What the model says, and its log-probabilities [M] of that."""
    drawn = generations.of(model)
    return drawn, generations.logprobs(model, drawn)


def _standard_error(values: Tensor) -> float:
    return float(values.std() / len(values) ** 0.5) if len(values) > 1 else 0.0
