"""A model as it was: what computing losses and moving weights changes in it is put back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from trainer_attrib.analysis.training_state import buffers_kept
from trainer_attrib.tap.names import parameters_by_name

_FORWARD = ("forward", "_original_forward")  # put on the model by accelerate, under autocast


@contextmanager
def model_undisturbed(model: nn.Module) -> Iterator[None]:
    """Buffers, gradients, modes, which weights train, and how it computes, afterwards as before the block. Whoever
    moves the weights puts them back. Gradients are gone inside the block."""
    parameters, modes = parameters_by_name(model), [(module, module.training) for module in model.modules()]
    gradients = [(p, p.grad, p.requires_grad) for p in parameters.values()]
    forward = {name: model.__dict__[name] for name in _FORWARD if name in model.__dict__}
    for parameter in parameters.values():
        parameter.grad = None
    try:
        with buffers_kept(model):
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
