"""The adjoint of torch's own optimizers, from their state and the settings that each recorded step used."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from trainer_attrib.analysis.stepping import use_settings
from trainer_attrib.analysis.unrolled.trajectory import Gradients, Visit
from trainer_attrib.errors import NotComparableError
from trainer_attrib.ledger.reader import StageReader
from trainer_attrib.numerics.update_adjoints import adamw_adjoint, sgd_adjoint
from trainer_attrib.numerics.update_rules import AdamWSettings, AdamWState, SGDSettings, SGDState

Moments = Mapping[str, Tensor]
_Rule = Callable[
    [Tensor, Moments, Tensor, Tensor, Moments, Mapping[str, Any]], tuple[Tensor, dict[str, Tensor], Tensor]
]
"""(weight, moments before the step, gradient, adjoint of the weight, of the moments, settings of the group) -> adjoints
of the weight and the moments before the step, and of the gradient."""


@dataclass
class Adjoint:
    """Derivatives of Q queries with respect to a state of training.

    Args:
        weights: by name, [Q, ...].
        moments: of the optimizer, by name of the weight and of the entry, [Q, ...]; what is not named has none.
    """

    weights: dict[str, Tensor]
    moments: dict[str, dict[str, Tensor]] = field(default_factory=dict)

    @property
    def queries(self) -> int:
        """How many."""
        return len(next(iter(self.weights.values())))


class Update:
    """The rule by which an optimizer turns clipped gradients into steps, backwards.

    Raises:
        NotComparableError: the optimizer is none of SGD, Adam, AdamW, or does what their rule here does not.
    """

    def __init__(self, stage: StageReader, optimizer: Optimizer, trained: Mapping[str, nn.Parameter]) -> None:
        self._stage, self._optimizer = stage, optimizer
        self._names = {id(parameter): name for name, parameter in trained.items()}
        self._rule = _rule_of(stage, optimizer)

    def adjoint(self, visit: Visit, gradient: Gradients, after: Adjoint) -> tuple[Adjoint, Gradients]:
        """Adjoints of the state before a step, without what the gradient tells of it, and of the gradient.

        Args:
            visit: the step.
            gradient: that it used, clipped.
            after: adjoint of the state after it.
        """
        use_settings(self._optimizer, self._stage, [visit.row])
        before, of_gradient = Adjoint(dict(after.weights), dict(after.moments)), Gradients()
        for group in self._optimizer.param_groups:
            for name in (self._names[id(parameter)] for parameter in group["params"]):
                if name in gradient:  # the others were not touched
                    before.weights[name], before.moments[name], of_gradient[name] = self._rule(
                        wide(visit.before.weights[name]), visit.before.optimizer.get(name, {}), wide(gradient[name]),
                        after.weights[name], after.moments.get(name, {}), group,
                    )  # fmt: skip
        return before, {name: of_gradient[name] for name in gradient}


def wide(tensor: Tensor) -> Tensor:
    """At least float32."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _adam(
    weight: Tensor, moments: Moments, gradient: Tensor, of_weight: Tensor, of_moments: Moments, group: Mapping[str, Any]
) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    decay, decoupled = group["weight_decay"], _decoupled(group)
    settings = AdamWSettings(
        learning_rate=float(group["lr"]), beta1=float(group["betas"][0]), beta2=float(group["betas"][1]),
        epsilon=group["eps"], weight_decay=decay if decoupled else 0.0,
    )  # fmt: skip
    zeros, step = torch.zeros_like(weight), int(moments.get("step", torch.zeros(()))) + 1
    state = AdamWState(weight, *(wide(moments.get(name, zeros)) for name in ("exp_avg", "exp_avg_sq")))
    after = AdamWState(of_weight, *(of_moments.get(name, zeros) for name in ("exp_avg", "exp_avg_sq")))
    used = gradient if decoupled else gradient + decay * weight
    before, of_gradient = adamw_adjoint(state, used, after, settings, step)
    of_before = before.weight if decoupled else before.weight + decay * of_gradient
    return of_before, {"exp_avg": before.mean, "exp_avg_sq": before.square}, of_gradient


def _sgd(
    weight: Tensor, moments: Moments, gradient: Tensor, of_weight: Tensor, of_moments: Moments, group: Mapping[str, Any]
) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    settings = SGDSettings(
        learning_rate=float(group["lr"]), momentum=group["momentum"], dampening=group["dampening"],
        nesterov=group["nesterov"], weight_decay=group["weight_decay"],
    )  # fmt: skip
    first = moments.get("momentum_buffer") is None
    after = SGDState(of_weight, of_moments.get("momentum_buffer", torch.zeros_like(weight)))
    before, of_gradient = sgd_adjoint(after, settings, 1 if first else 2)
    return before.weight, {"momentum_buffer": before.momentum}, of_gradient


def _decoupled(group: Mapping[str, Any]) -> bool:
    return bool(group.get("decoupled_weight_decay", False))


def _rule_of(stage: StageReader, optimizer: Optimizer) -> _Rule:
    rules: dict[type, _Rule] = {torch.optim.SGD: _sgd, torch.optim.Adam: _adam, torch.optim.AdamW: _adam}
    rule = rules.get(type(optimizer))
    odd = [name for name in ("amsgrad", "maximize") if any(group.get(name) for group in optimizer.param_groups)]
    if rule is None or odd:
        raise NotComparableError(
            f"Stage '{stage.name}' was trained by {type(optimizer).__name__}{' with ' if odd else ''}{', '.join(odd)}, "
            "whose update cannot be followed backwards.",
            cause="only those of torch's SGD, Adam and AdamW are known.",
            fix="choose another recipe for this stage.",
        )
    return rule
