"""A Trainer as it was: what computing with it changes in it is put back."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from trainer_attrib.analysis.training_state import TrainingState, random_states_kept, standing
from trainer_attrib.tap.names import buffers_by_name, parameters_by_name

_FORWARD = ("forward", "_original_forward")  # put on the model by accelerate, under autocast


@contextmanager
def trainer_undisturbed(trainer: Any) -> Iterator[None]:
    """Inside the block the trainer's losses may be computed, its loaders read and its model moved; afterwards its
    model's weights, buffers, gradients and modes, random numbers, its own notes and accelerate's are what they were.
    Gradients are gone inside."""
    own, state = dict(trainer.__dict__), copy.deepcopy(trainer.state)
    metrics = copy.deepcopy(getattr(trainer, "_metrics", None))
    with random_states_kept(), model_undisturbed(trainer.model), _accelerate_undisturbed(trainer.accelerator):
        try:
            yield
        finally:
            trainer.__dict__.clear()
            trainer.__dict__.update(own)
            trainer.state.__dict__.clear()
            trainer.state.__dict__.update(state.__dict__)
            if metrics is not None:
                trainer._metrics = metrics


@contextmanager
def model_undisturbed(model: nn.Module) -> Iterator[None]:
    """Weights, buffers, gradients, modes, and which weights train."""
    parameters, modes = parameters_by_name(model), [(module, module.training) for module in model.modules()]
    gradients = [(p, p.grad, p.requires_grad) for p in parameters.values()]
    buffers = {name: buffer.detach().clone() for name, buffer in buffers_by_name(model).items()}
    forward = {name: model.__dict__[name] for name in _FORWARD if name in model.__dict__}
    for parameter in parameters.values():
        parameter.grad = None
    try:
        with standing(model, TrainingState({}, buffers)):
            yield
    finally:
        for parameter, gradient, trains in gradients:
            parameter.grad = gradient
            parameter.requires_grad_(trains)
        for module, training in modes:
            module.training = training
        for name in _FORWARD:
            model.__dict__.pop(name, None)
        model.__dict__.update(forward)


@contextmanager
def _accelerate_undisturbed(accelerator: Any) -> Iterator[None]:
    """Its lists of what it prepared, and the state of accumulation, which all accelerators of a process share: loaders
    that are not read to their end stay in it."""
    lists = {name: list(value) for name, value in vars(accelerator).items() if isinstance(value, list)}
    step, shared = accelerator.step, accelerator.gradient_state.__dict__
    before = {key: list(value) if isinstance(value, list) else value for key, value in shared.items()}
    try:
        yield
    finally:
        for name, value in lists.items():
            getattr(accelerator, name)[:] = value
        accelerator.step = step
        shared.clear()
        shared.update(before)
