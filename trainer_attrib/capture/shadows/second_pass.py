"""A pass of the model that training must not notice: at other weights, with everything else put back as it was."""

from __future__ import annotations

import copy
import random
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from trainer_attrib.errors import CaptureError
from trainer_attrib.tap.names import walk

_CONTAINERS = (dict, defaultdict, OrderedDict, Counter, list, set, deque)
_DEPTH, _LONG = 3, 1000
"""How deep containers in containers are copied, and above which length what is in them no longer is."""


@dataclass(frozen=True)
class RandomStates:
    """Of torch (the CPU's and the given devices'), numpy and Python."""

    torch_cpu: Tensor
    torch_devices: Mapping[torch.device, Tensor]
    numpy: Any
    python: Any

    @staticmethod
    def now(devices: Iterable[torch.device]) -> RandomStates:
        """The current ones."""
        own = {device: _generator_of(device).get_state() for device in devices if device.type != "cpu"}
        return RandomStates(torch.get_rng_state(), own, np.random.get_state(), random.getstate())

    def restore(self) -> None:
        """Go on from here."""
        torch.set_rng_state(self.torch_cpu)
        for device, state in self.torch_devices.items():
            _generator_of(device).set_state(state)
        np.random.set_state(self.numpy)
        random.setstate(self.python)


def _generator_of(device: torch.device) -> torch.Generator:
    """A device's default generator."""
    module = torch.get_device_module(device)
    if device.type == "mps":
        return module._get_default_mps_generator()
    return module.default_generators[module.current_device() if device.index is None else device.index]


@contextmanager
def random_kept(devices: Iterable[torch.device], begin: RandomStates | None = None) -> Iterator[None]:
    """Random numbers drawn inside, from ``begin`` on if it is given, are drawn again by what follows."""
    before = RandomStates.now(devices)
    if begin is not None:
        begin.restore()
    try:
        yield
    finally:
        before.restore()


@contextmanager
def weights_at(values: Sequence[tuple[nn.Parameter, Tensor]]) -> Iterator[None]:
    """Parameters with other values. Nothing is copied but values that are kept on another device."""
    kept = [(parameter, parameter.data) for parameter, _ in values]
    try:
        for parameter, value in values:
            parameter.data = value.data.to(parameter.device)
        yield
    finally:
        for parameter, data in kept:
            parameter.data = data


class Surroundings:
    """What a pass may change beside random states: buffers, gradients, and attributes of modules and other objects.

    Buffers are replaced by copies for the time of a pass; attributes that are tensors or containers too (running
    metrics, caches, lists of losses), so that what is written into them is forgotten.

    Args:
        model: whose modules are guarded.
        others: other objects that computing the loss may write to, for instance the trainer.
    """

    def __init__(self, model: nn.Module, others: Iterable[Any] = ()) -> None:
        self._model, self._others = model, tuple(others)
        self._names = {
            (id(named.module), key): f"{named.name}.{key}" if named.name else key
            for named in walk(model)
            for key in named.module._buffers
        }

    def buffers(self) -> dict[str, Tensor]:
        """Copies of all buffers, also those that are not stored."""
        found = {}
        for module in self._model.modules():
            for key, buffer in module._buffers.items():
                if buffer is not None:
                    found[self._names.get((id(module), key), key)] = buffer.detach().clone()
        return found

    @contextmanager
    def guarded(self, buffers: dict[str, Tensor] | None = None) -> Iterator[None]:
        """Put everything back afterwards.

        Args:
            buffers: the pass's own buffers by name, which it updates; None for copies of the model's, forgotten after.
        """
        with ExitStack() as after:
            copies: dict[int, Tensor] = {}
            for module in self._model.modules():
                after.callback(_restore, module.__dict__, dict(module.__dict__))
                after.callback(_restore, module._buffers, dict(module._buffers))
                _replace(module.__dict__, _MODULES_OWN)
                for key, buffer in module._buffers.items():
                    if buffer is None:
                        continue
                    name = self._names.get((id(module), key), key)
                    if id(buffer) not in copies:
                        own = None if buffers is None else buffers.get(name)
                        copies[id(buffer)] = buffer.detach().clone() if own is None else own.to(buffer.device)
                    module._buffers[key] = copies[id(buffer)]
            for other in self._others:
                after.callback(_restore, vars(other), dict(vars(other)))
                _replace(vars(other), frozenset())
            for parameter in self._model.parameters():
                if parameter.grad is not None:
                    after.callback(setattr, parameter, "grad", parameter.grad)
                    parameter.grad = None
                else:
                    after.callback(setattr, parameter, "grad", None)
            yield
            if buffers is not None:
                self._keep(buffers)

    def _keep(self, buffers: dict[str, Tensor]) -> None:
        for module in self._model.modules():
            for key, buffer in module._buffers.items():
                name = self._names.get((id(module), key), key)
                if buffer is not None and name in buffers:
                    buffers[name] = buffer.detach().to(buffers[name].device)


def gradients(
    loss_of: Callable[[Any], Any], part: Any, parameters: Mapping[str, nn.Parameter], scale: Tensor | None
) -> dict[str, Tensor]:
    """Gradients of a part's loss by name. ``.grad`` must be empty, and holds them too; other weights' are ignored.

    Args:
        loss_of: part -> loss, 0-dim.
        part: what it is computed on.
        parameters: those wanted.
        scale: by what the loss is multiplied for the backward pass, so that half precision does not lose it.

    Raises:
        CaptureError: what came back is no loss.
    """
    torch.clear_autocast_cache()  # it may hold a cast of the weights that were there before
    with torch.enable_grad():
        loss = loss_of(part)
        if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
            raise CaptureError(
                f"The loss of a part of the batch is {type(loss).__name__}, not a number that depends on the weights.",
                fix="return the loss as it is backpropagated.",
            )
        (loss if scale is None else loss * scale.to(loss.dtype)).backward()
    torch.clear_autocast_cache()
    found = {name: p.grad for name, p in parameters.items() if p.grad is not None}
    return found if scale is None else {name: gradient / scale.to(gradient.dtype) for name, gradient in found.items()}


_MODULES_OWN = frozenset(vars(nn.Module()))
"""Attributes that every module has: parameters, buffers, children, hooks."""


def _replace(attributes: dict[str, Any], but: frozenset[str]) -> None:
    for name, value in list(attributes.items()):
        if name in but:
            continue
        if type(value) is Tensor and not value.requires_grad:
            attributes[name] = value.clone()
        elif type(value) in _CONTAINERS:
            attributes[name] = _copied(value, _DEPTH)


def _copied(value: Any, depth: int) -> Any:
    """A container with the containers in it copied; what they hold is the same."""
    if depth == 0 or type(value) not in _CONTAINERS:
        return value
    twin = copy.copy(value)
    if len(twin) > _LONG:
        return twin
    if isinstance(twin, dict):
        for key, inner in value.items():
            twin[key] = _copied(inner, depth - 1)
    elif isinstance(twin, list):
        twin[:] = [_copied(inner, depth - 1) for inner in value]
    return twin


def _restore(attributes: dict[str, Any], before: dict[str, Any]) -> None:
    attributes.clear()
    attributes.update(before)
