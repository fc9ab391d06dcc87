"""Displacements: where the weights would be. Applied to a model for the time of a measurement, then undone exactly."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from trainer_attrib.analysis.training_state import TrainingState, standing
from trainer_attrib.ledger.reader import StageReader
from trainer_attrib.tap.names import parameters_by_name

Displacement = dict[str, Tensor]
"""Parameter name -> predicted change, on the CPU: float64, or the weights' own precision in forecasts."""


@contextmanager
def moved(model: nn.Module, displacement: Displacement) -> Iterator[nn.Module]:
    """The model with its weights moved by a displacement inside the block."""
    parameters = parameters_by_name(model)
    target = {name: parameters[name].detach().double().cpu() + change.double() for name, change in displacement.items()}
    with standing(model, TrainingState(target)):
        yield model


def between(first: TrainingState, second: TrainingState) -> Displacement:
    """The second state's weights minus the first's, of those that differ; both hold the same weights."""
    pairs = ((name, value, second.weights[name]) for name, value in first.weights.items())
    return {name: b.double() - a.double() for name, a, b in pairs if not torch.equal(a, b)}


def surviving_share(stages: list[StageReader], name: str) -> float:
    """By how much the weight decay of later stages shrank what an earlier stage had added to one parameter.

    The product over steps of (1 - lr * wd) for decoupled decay and of (1 - lr * wd / (1 - momentum)) for SGD, whose
    decay passes through the momentum. Adam's coupled decay is divided by the second moment and leaves no such product;
    it is counted as 1.
    """
    share = 1.0
    for stage in stages:
        for number, optimizer in enumerate(stage.meta["optimizers"]):
            share *= _surviving_optimizer(stage, number, optimizer, name)
    return share


def _surviving_optimizer(stage: StageReader, number: int, optimizer: dict[str, Any], name: str) -> float:
    group = next((i for i, g in enumerate(optimizer["groups"]) if name in g["parameters"]), None)
    sgd = optimizer["class"].endswith(".SGD")
    if group is None or not (optimizer["decoupled_weight_decay"] or sgd):
        return 1.0
    share = 1.0
    for step in stage.steps().select(["optimizer", "learning_rate", "weight_decay", "beta1"]).to_pylist():
        if step["optimizer"] == number:
            momentum = step["beta1"][group] if sgd else 0.0
            share *= 1.0 - step["learning_rate"][group] * step["weight_decay"][group] / (1.0 - momentum)
    return share


def subtracted(change: Displacement, later: list[StageReader]) -> Displacement:
    """The displacement that takes a stage's change out of the final weights, ignoring how later stages reacted."""
    return {name: -surviving_share(later, name) * delta for name, delta in change.items()}
