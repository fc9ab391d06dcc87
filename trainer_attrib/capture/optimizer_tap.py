"""Reads each executed update from inside ``optimizer.step``.

The optimizer's post-step hook is the one event that means the same in every framework: it fires once per real update,
also for fused and foreach implementations, not for steps that a gradient scaler skips, and it sees the learning rate,
the gradients and the second moments that the update used (measured; bergson and others read the next step's values).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer
from torch.utils.hooks import RemovableHandle

from trainer_attrib.capture.moment_readers import overwrites_gradients
from trainer_attrib.errors import ConfigurationError


@dataclass(frozen=True)
class GroupSettings:
    """One parameter group's settings as the step used them. ``beta1`` is the momentum for SGD; the learning rate is NaN
    where the optimizer makes its own for each weight (``transformers``' Adafactor)."""

    learning_rate: float
    weight_decay: float
    beta1: float
    beta2: float


def unwrap_optimizer(optimizer: Any) -> Optimizer:
    """The torch optimizer inside accelerate's or Lightning's wrapper."""
    while not hasattr(optimizer, "_optimizer_step_post_hooks") and hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def owners(optimizers: Sequence[Optimizer]) -> dict[int, int]:
    """The ``id`` of every parameter that is updated -> number of its optimizer.

    Raises:
        ConfigurationError: two optimizers update the same parameter.
    """
    found: dict[int, int] = {}
    for number, optimizer in enumerate(optimizers):
        for parameter in (p for group in optimizer.param_groups for p in group["params"]):
            if found.setdefault(id(parameter), number) != number:
                raise ConfigurationError(
                    f"Optimizers {found[id(parameter)]} and {number} both update a parameter of shape "
                    f"{tuple(parameter.shape)}.",
                    cause="its gradient cannot be told apart into that of one and of the other.",
                    fix="give each optimizer parameters of its own, or record only one of them.",
                )
    return found


class OptimizerTap:
    """Calls ``after_step`` after every executed update, with the gradients that it used, until detached.

    An optimizer that handles a gradient scaler's work itself (fused ones) is called for steps that are to be skipped
    as well, with the number of overflows in ``found_inf``: then ``skipped`` is called. To see that number the device is
    waited for, as the scaler does for every other optimizer.
    """

    def __init__(self, optimizer: Any, after_step: Callable[[], None], skipped: Callable[[], None]) -> None:
        self.optimizer = unwrap_optimizer(optimizer)
        self.calls = 0
        self.skipped = skipped
        self._after_step = after_step
        self._handles: list[RemovableHandle] = []
        self._used: list[tuple[Tensor, Tensor]] = []  # parameters and their gradients, where the step overwrites them

    def attach(self) -> OptimizerTap:
        """Register the hooks."""
        if overwrites_gradients(self.optimizer):
            self._handles.append(self.optimizer.register_step_pre_hook(self._before_overwriting))
        self._handles.append(self.optimizer.register_step_post_hook(self._after))
        return self

    def detach(self) -> None:
        """Remove the hooks; safe to call twice."""
        while self._handles:
            self._handles.pop().remove()
        self._used = []

    def _before_overwriting(self, optimizer: Optimizer, args: Any, kwargs: dict[str, Any]) -> Any:
        """Copy the gradients, after the closure if they are computed inside the step. ``args`` begin with self."""
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is None:
            self._keep_gradients()
            return None

        @torch.enable_grad()
        def and_keep() -> Any:
            loss = closure()
            self._keep_gradients()
            return loss

        return (args[0],), kwargs | {"closure": and_keep}

    def _keep_gradients(self) -> None:
        parameters = [p for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        self._used = [(p, p.grad.clone()) for p in parameters]

    def _after(self, optimizer: Optimizer, args: Any, kwargs: dict[str, Any]) -> None:
        """Show ``after_step`` the gradients that were used; put back what the step left."""
        self.calls += 1
        overflows = getattr(optimizer, "found_inf", None)
        if isinstance(overflows, Tensor) and bool(overflows > 0):
            self._used = []
            self.skipped()
            return
        left = [(p, p.grad) for p, _ in self._used]
        for p, gradient in self._used:
            p.grad = gradient
        try:
            self._after_step()
        finally:
            for p, gradient in left:
                p.grad = gradient
            self._used = []


def group_settings(optimizer: Optimizer) -> list[GroupSettings]:
    """Settings of every parameter group."""
    return [_settings(group) for group in optimizer.param_groups]


def _settings(group: dict[str, Any]) -> GroupSettings:
    beta1, beta2 = group.get("betas", (group.get("momentum", 0.0), 0.0))
    rate = float("nan") if group["lr"] is None else float(group["lr"])
    return GroupSettings(rate, float(group.get("weight_decay", 0.0)), float(beta1), float(beta2))


def describe_optimizer(optimizer: Optimizer, names: dict[int, str]) -> dict[str, Any]:
    """Class, state and groups as JSON: which parameters, which constant settings."""
    groups = []
    for group in optimizer.param_groups:
        constants = {k: v for k, v in group.items() if k != "params" and isinstance(v, int | float | bool | str)}
        settings = _settings(group)
        constants |= {
            "lr": None if group["lr"] is None else settings.learning_rate,
            "betas": [settings.beta1, settings.beta2],
        }
        groups.append({"parameters": [names.get(id(p), "?") for p in group["params"]], "settings": constants})
    kind = type(optimizer)
    return {
        "class": f"{kind.__module__}.{kind.__qualname__}",
        "decoupled_weight_decay": _decoupled(optimizer),
        "fresh": is_fresh(optimizer),
        "groups": groups,
    }


def is_fresh(optimizer: Optimizer) -> bool:
    """Whether it has taken no step yet: no state, or the one it was made with (Adagrad's)."""
    return all(isinstance(state, dict) and float(state.get("step", 1)) == 0 for state in optimizer.state.values())


def _decoupled(optimizer: Optimizer) -> bool:
    return isinstance(optimizer, AdamW) or any(g.get("decoupled_weight_decay") for g in optimizer.param_groups)
