"""A Trainer as it was: what computing with it changes in it is put back."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from trainer_attrib.analysis.training_state import random_states_kept
from trainer_attrib_integrations.undisturbed_model import model_undisturbed


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
