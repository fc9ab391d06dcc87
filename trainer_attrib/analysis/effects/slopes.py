"""Derivatives of behaviors with respect to a model's weights, and along displacements of them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from trainer_attrib.analysis.behavior import Behavior, evaluating
from trainer_attrib.analysis.curvature import gradients_of
from trainer_attrib.analysis.displacement import Displacement
from trainer_attrib.errors import BehaviorError
from trainer_attrib.tap.names import parameters_by_name


def slopes_along(model: nn.Module, behavior: Behavior, displacement: Displacement) -> Tensor:
    """Derivative of every query's value along a displacement, at the model's weights: gradient . displacement.

    Costs about three forward passes and three backward passes of the behavior, however many queries it has: J d is the
    derivative of J^T u with respect to u. Measures that cannot be differentiated twice cost a gradient per query.

    Returns:
        float64 [Q] on the CPU.

    Raises:
        BehaviorError: the measure has no gradient.
    """
    try:
        return torch.cat([_along(model, behavior, first, displacement) for first in behavior.batches()])
    except RuntimeError:
        return torch.stack([inner(gradient, displacement) for gradient in gradients(model, behavior, displacement)])


def gradients(model: nn.Module, behavior: Behavior, names: Displacement) -> Iterator[Displacement]:
    """Gradient of each query in turn, with respect to the weights named.

    Raises:
        BehaviorError: the measure has no gradient.
    """
    places = _places(model, names)
    for query in range(len(behavior)):
        with evaluating(model), gradients_of(list(places.values())), torch.enable_grad():
            value = _differentiable(behavior, behavior.value_of(model, query))
            found = torch.autograd.grad(value, list(places.values()), allow_unused=True)
        pairs = zip(places.items(), found, strict=True)
        yield {n: torch.zeros(p.shape).double() if g is None else g.double().cpu() for (n, p), g in pairs}


def inner(first: Displacement, second: Displacement) -> Tensor:
    """Inner product over the weights that both have, float64, 0-dim."""
    parts = [(first[name].double() * second[name].double()).sum() for name in sorted(first.keys() & second.keys())]
    return torch.stack(parts).sum() if parts else torch.zeros(()).double()


def _along(model: nn.Module, behavior: Behavior, first: int, displacement: Displacement) -> Tensor:
    places = _places(model, displacement)
    parameters = list(places.values())
    with evaluating(model), gradients_of(parameters), torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        values_Q = _differentiable(behavior, behavior.values_from(model, first))
        probe_Q = torch.zeros_like(values_Q, requires_grad=True)
        pulled = torch.autograd.grad(values_Q, parameters, probe_Q, create_graph=True, allow_unused=True)
        along = [(g * displacement[n].to(g)).sum() for n, g in zip(places, pulled, strict=True) if g is not None]
        if not along:
            return torch.zeros(len(values_Q)).double()
        return torch.autograd.grad(torch.stack(along).sum(), probe_Q)[0].double().cpu()


def _places(model: nn.Module, names: Displacement) -> dict[str, Tensor]:
    return {name: place for name, place in parameters_by_name(model).items() if name in names}


def _differentiable(behavior: Behavior, value: Tensor) -> Tensor:
    if not value.requires_grad:
        raise BehaviorError(
            f"Behavior '{behavior.name}' has no gradient.",
            cause="its measure detaches, rounds or samples.",
            fix="influence needs a differentiable measure; for stage effects, read_out='moved weights' takes any.",
        )
    return value
