"""Reads each executed update from inside ``optimizer.step``.

The optimizer's post-step hook is the one event that means the same in every framework: it fires once per real update,
also for fused and foreach implementations, not for steps that a gradient scaler skips, and it sees the learning rate,
the gradients and the second moments that the update used (measured; bergson and others read the next step's values).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.optim import Adam, AdamW, Optimizer
from torch.utils.hooks import RemovableHandle


@dataclass(frozen=True)
class GroupSettings:
    """One parameter group's settings as the step used them. ``beta1`` is the momentum for SGD."""

    learning_rate: float
    weight_decay: float
    beta1: float
    beta2: float


def unwrap_optimizer(optimizer: Any) -> Optimizer:
    """The torch optimizer inside accelerate's or Lightning's wrapper."""
    while not hasattr(optimizer, "_optimizer_step_post_hooks") and hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


class OptimizerTap:
    """Calls ``after_step`` after every executed update, until detached."""

    def __init__(self, optimizer: Any, after_step: Callable[[], None]) -> None:
        self.optimizer = unwrap_optimizer(optimizer)
        self._after_step = after_step
        self._handle: RemovableHandle | None = None

    def attach(self) -> OptimizerTap:
        """Register the hook."""
        self._handle = self.optimizer.register_step_post_hook(lambda optimizer, args, kwargs: self._after_step())
        return self

    def detach(self) -> None:
        """Remove the hook; safe to call twice."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None


def group_settings(optimizer: Optimizer) -> list[GroupSettings]:
    """Settings of every parameter group."""
    return [_settings(group) for group in optimizer.param_groups]


def _settings(group: dict[str, Any]) -> GroupSettings:
    beta1, beta2 = group.get("betas", (group.get("momentum", 0.0), 0.0))
    return GroupSettings(float(group["lr"]), float(group.get("weight_decay", 0.0)), float(beta1), float(beta2))


def describe_optimizer(optimizer: Optimizer, names: dict[int, str]) -> dict[str, Any]:
    """Class, state and groups as JSON: which parameters, which constant settings."""
    groups = []
    for group in optimizer.param_groups:
        constants = {k: v for k, v in group.items() if k != "params" and isinstance(v, int | float | bool | str)}
        settings = _settings(group)
        constants |= {"lr": settings.learning_rate, "betas": [settings.beta1, settings.beta2]}
        groups.append({"parameters": [names.get(id(p), "?") for p in group["params"]], "settings": constants})
    kind = type(optimizer)
    return {
        "class": f"{kind.__module__}.{kind.__qualname__}",
        "decoupled_weight_decay": _decoupled(optimizer),
        "fresh": not optimizer.state,
        "groups": groups,
    }


def _decoupled(optimizer: Optimizer) -> bool:
    return isinstance(optimizer, AdamW) or any(g.get("decoupled_weight_decay") for g in optimizer.param_groups)


def correction_unavailable(optimizer: Optimizer) -> str:
    """Why this optimizer's second moments cannot be used, or ``""``. Raw rows are stored where there is a reason."""
    if isinstance(optimizer, Adam | AdamW):
        return ""
    return f"{type(optimizer).__name__} keeps no second moments that this version reads; rows are raw gradients"


def second_moment(optimizer: Optimizer, parameter: Tensor) -> Tensor | None:
    """Bias-corrected second moment that the step just executed divided by; None before the parameter's first update.

    v / (1 - beta2^t), with the running maximum of v for amsgrad (Kingma & Ba 2015, algorithm 1; Reddi et al. 2018).
    """
    state = optimizer.state.get(parameter, {})
    if "exp_avg_sq" not in state:
        return None
    group = next(g for g in optimizer.param_groups if any(p is parameter for p in g["params"]))
    moment = state["max_exp_avg_sq"] if group.get("amsgrad") else state["exp_avg_sq"]
    return moment / (1 - float(group["betas"][1]) ** float(state["step"]))
