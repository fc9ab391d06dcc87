"""A second optimizer of the same class over other tensors: it takes the steps of the first with other gradients."""

from __future__ import annotations

import copy
import inspect
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from trainer_attrib.capture.beside import stored_state
from trainer_attrib.errors import ConfigurationError

State = Mapping[str, Mapping[str, Any]]
"""Weight -> entry -> value, numbers as 0-dim float64 where it comes from a ledger."""

_NOT_COPIED = {"state", "param_groups", "step", "grad_scale", "found_inf"}  # "step" is what a scheduler wrapped


def group_settings_now(optimizer: Optimizer) -> list[dict[str, Any]]:
    """Everything that parameter groups hold beside their parameters."""
    return [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]


class Twin:
    """Copies an optimizer's object, with parameter groups and a state of its own and without its hooks.

    Args:
        optimizer: the first.
        tensors: weight -> tensor to update instead.
        parameters: weight -> parameter that the first updates.

    Raises:
        ConfigurationError: the optimizer cannot be copied, or needs a closure.
    """

    def __init__(
        self, optimizer: Optimizer, tensors: Mapping[str, Tensor], parameters: Mapping[str, nn.Parameter]
    ) -> None:
        refuse_closures(optimizer)
        names = {id(parameter): name for name, parameter in parameters.items()}
        self.tensors = {name: nn.Parameter(tensor, requires_grad=True) for name, tensor in tensors.items()}
        own: dict[int, Any] = {id(parameter): self.tensors[names[id(parameter)]] for parameter in _updated(optimizer)}
        attributes = {
            key: value
            for key, value in vars(optimizer).items()
            if key not in _NOT_COPIED and not (key.startswith("_optimizer_") and key.endswith("_hooks"))
        }
        self._optimizer = object.__new__(type(optimizer))
        try:
            vars(self._optimizer).update(copy.deepcopy(attributes, own))
        except Exception as error:
            raise ConfigurationError(
                f"A shadow needs a second optimizer, and this {type(optimizer).__name__} cannot be copied: {error}.",
                fix="train without shadow=.",
            ) from error
        for key in vars(optimizer):
            if key.startswith("_optimizer_") and key.endswith("_hooks"):
                setattr(self._optimizer, key, type(getattr(optimizer, key))())
        self._optimizer.state = defaultdict(dict)
        self._groups = [[names[id(parameter)] for parameter in group["params"]] for group in optimizer.param_groups]
        self._optimizer.param_groups = [
            {**settings, "params": [self.tensors[name] for name in group]}
            for settings, group in zip(group_settings_now(optimizer), self._groups, strict=True)
        ]

    def step(self, gradients: Mapping[str, Tensor], settings: Sequence[dict[str, Any]]) -> None:
        """Take a step with these gradients; weights that have none are left alone, as the first optimizer does.

        Args:
            gradients: by weight.
            settings: of each group, as the first optimizer's step begins with.
        """
        for group, now in zip(self._optimizer.param_groups, settings, strict=True):
            group.update(now)
        for name, tensor in self.tensors.items():
            tensor.grad = gradients.get(name)
        step = type(self._optimizer).step
        step = getattr(step, "__wrapped__", step) if getattr(step, "hooked", False) else step  # without global hooks
        try:
            with torch.no_grad():
                step(self._optimizer)
        finally:
            for tensor in self.tensors.values():
                tensor.grad = None

    def state(self) -> tuple[dict[str, Tensor], list[str]]:
        """The state as ``0/WEIGHT/KEY`` -> copy on the CPU, and the entries that cannot be stored."""
        state, left_out = stored_state([self._optimizer], self.tensors)
        return {path: value for path, value in state.items() if isinstance(value, Tensor)}, left_out

    def load(self, state: State, like: Optimizer, parameters: Mapping[str, nn.Parameter]) -> None:
        """Begin with a state.

        Args:
            state: by weight; those that are not updated here are ignored.
            like: the first optimizer, whose entries say what is a number and what stays on the CPU.
            parameters: weight -> parameter that it updates.
        """
        for name in self.tensors.keys() & state.keys():
            known = like.state.get(parameters[name], {})
            self._optimizer.state[self.tensors[name]] = {
                key: _as_in(known.get(key), value, self.tensors[name], parameters[name])
                for key, value in state[name].items()
            }


def initial_state(optimizer: Optimizer, parameters: Mapping[str, nn.Parameter]) -> State:
    """The state that a fresh optimizer was made with (Adagrad's), empty for most."""
    return {name: optimizer.state[p] for name, p in parameters.items() if p in optimizer.state}


def refuse_closures(optimizer: Optimizer) -> None:
    """Raises ConfigurationError for an optimizer that computes the loss again inside its step (LBFGS)."""
    closure = inspect.signature(type(optimizer).step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise ConfigurationError(
            f"A shadow cannot follow {type(optimizer).__name__}, whose step computes the loss several times.",
            fix="train without shadow=.",
        )


def _updated(optimizer: Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _as_in(known: Any, value: Any, tensor: Tensor, parameter: Tensor) -> Any:
    if isinstance(known, bool | int | float):
        return type(known)(value.item() if isinstance(value, Tensor) else value)
    if not isinstance(value, Tensor):
        return copy.deepcopy(value)
    if isinstance(known, Tensor):
        device = tensor.device if known.device == parameter.device else known.device
        return value.to(device, known.dtype, copy=True)
    return value.to("cpu" if value.dim() == 0 else tensor.device, copy=True)
