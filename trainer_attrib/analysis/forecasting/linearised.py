"""A model whose outputs are those of moved weights, to first order, and whose derivatives are those of its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from trainer_attrib.analysis.displacement import Displacement, moved
from trainer_attrib.tap.names import parameters_by_name

SMALL = 0.005
"""Largest step, as a share of the weights' norm, by which outputs are differenced in float32: there differences agree
with derivatives to three digits."""
_OUTPUTS = ("log_probs", "logits", "rewards")


@contextmanager
def linearised_outputs(model: nn.Module, displacement: Displacement) -> Iterator[list[str]]:
    """Inside the block, what a loss is computed from, log-probabilities or logits, has the value f + J d while its
    derivative with respect to the weights stays J. Yields the names of the outputs through which a loss was
    backpropagated so far: none if it is not computed from them.

    J d is a difference of two forward passes. Forward passes without gradients, as those of a reference model that
    shares the weights, stay as they are.
    """
    size = _norm(displacement.values())
    weights = _norm(p.detach() for p in parameters_by_name(model).values())
    step = min(1.0, SMALL * weights / size) if size > 0 else 0.0
    there: list[dict[str, Tensor]] = []
    refreshed: list[str] = []
    busy = [False]

    def before(module: nn.Module, args: Any, kwargs: Any) -> None:
        if busy[0] or not torch.is_grad_enabled() or step == 0:
            return
        busy[0] = True
        try:
            states = torch.get_rng_state()
            with torch.no_grad(), moved(module, {name: step * d for name, d in displacement.items()}):
                there.append(_found(module(*args, **kwargs)))
            torch.set_rng_state(states)  # dropout draws the same mask again
        finally:
            busy[0] = False

    def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if busy[0] or not torch.is_grad_enabled():
            return
        here = _found(output)
        changed = there.pop() if step else here
        for name, value in here.items():
            moved_value = value + ((changed[name] - value.detach()) / step if step else 0.0)
            if moved_value.requires_grad:
                moved_value.register_hook(lambda _, name=name: refreshed.append(name))
            setattr(output, name, moved_value)

    hooks = [
        model.register_forward_pre_hook(before, with_kwargs=True),
        model.register_forward_hook(after, with_kwargs=True),
    ]
    try:
        yield refreshed
    finally:
        for hook in hooks:
            hook.remove()


def _found(output: Any) -> dict[str, Tensor]:
    """What losses outside of the model may be computed from."""
    return {name: value for name in _OUTPUTS if isinstance(value := getattr(output, name, None), Tensor)}


def _norm(parts: Any) -> float:
    norms = [part.double().norm().cpu() for part in parts]
    return float(torch.stack(norms).norm()) if norms else 0.0
