"""What training changes: weights, buffers, the optimizer's state. A stage maps one such state to the next."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from torch import Tensor, nn

from trainer_attrib.ledger.snapshots import combine, fingerprint_tensors
from trainer_attrib.tap.names import buffers_by_name, parameters_by_name

OptimizerState = Mapping[str, Mapping[str, Tensor]]
"""Parameter name -> entry of the optimizer's state -> its value."""


@dataclass(frozen=True)
class TrainingState:
    """Where training stands. What is not named stands as in the model that the state is put into.

    Args:
        weights: parameters by name.
        buffers: persistent buffers by name, such as BatchNorm's running means.
        optimizer: state that the next stage begins with, where it carries its optimizer on; empty is a new optimizer.
    """

    weights: dict[str, Tensor]
    buffers: dict[str, Tensor] = field(default_factory=dict)
    optimizer: OptimizerState = field(default_factory=dict)

    @cached_property
    def finite(self) -> bool:
        """Whether training has not diverged."""
        return all(bool(torch.isfinite(w).all()) for w in self.weights.values() if w.is_floating_point())


@contextmanager
def standing(model: nn.Module, state: TrainingState) -> Iterator[nn.Module]:
    """The model with a state's weights and buffers inside the block; its own bits afterwards, whatever happened."""
    places = {**parameters_by_name(model), **buffers_by_name(model)}
    kept = {name: places[name].detach().clone() for name in {*state.weights, *state.buffers} & places.keys()}
    try:
        put(model, state)
        yield model
    finally:
        _assign(places, kept)


def put(model: nn.Module, state: TrainingState) -> None:
    """Set a model's weights and buffers to a state's, for good."""
    places = {**parameters_by_name(model), **buffers_by_name(model)}
    _assign(places, {name: value for name, value in {**state.weights, **state.buffers}.items() if name in places})


def state_of(model: nn.Module, optimizer: OptimizerState | None = None) -> TrainingState:
    """Copies of a model's weights and buffers on the CPU."""
    weights = {name: _copied(p) for name, p in parameters_by_name(model).items()}
    return TrainingState(weights, {name: _copied(b) for name, b in buffers_by_name(model).items()}, optimizer or {})


@contextmanager
def buffers_kept(model: nn.Module) -> Iterator[None]:
    """Persistent buffers, such as running means that a forward pass in training mode moves, are afterwards what they
    were."""
    with standing(model, TrainingState({}, {name: _copied(b) for name, b in buffers_by_name(model).items()})):
        yield


def fingerprint_of(model: nn.Module) -> str:
    """A hash of the bytes of all parameters."""
    return combine(fingerprint_tensors({name: p.detach() for name, p in parameters_by_name(model).items()}))


def copy_model(model: nn.Module) -> nn.Module:
    """A deep copy that computes with its own weights.

    TRL replaces ``model.forward`` by a wrapper whose closure holds the original model; a copy of it would go on
    computing with the original's weights. Such a wrapper of the class's own forward is dropped; trainers put it back.
    """
    copied = copy.deepcopy(model)
    patched = copied.__dict__.get("forward")
    if getattr(patched, "__wrapped__", None) is type(copied).forward:
        del copied.__dict__["forward"]
    return copied


@contextmanager
def random_states_kept() -> Iterator[None]:
    """Random numbers drawn inside the block are drawn again after it."""
    python, numeric = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numeric)


def _assign(places: Mapping[str, Tensor], values: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, value in values.items():
            places[name].copy_(value)


def _copied(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().clone()
