"""Update rules of AdamW and SGD and their tangents, as pure functions on one weight of any shape.

A rule maps (state, gradient) to the next state; its tangent maps a change of both to the change of the next state (a
Jacobian-vector product). Chained over steps they say how a changed gradient travels through momentum and moments.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class AdamWSettings:
    """One step's settings; the decay is decoupled and scaled by the learning rate, as in ``torch.optim.AdamW``."""

    learning_rate: float
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    weight_decay: float = 0.01


class AdamWState(NamedTuple):
    """A weight with its running means of gradients and of squared gradients, or a change of the three."""

    weight: Tensor
    mean: Tensor
    square: Tensor


def adamw_step(state: AdamWState, gradient: Tensor, settings: AdamWSettings, step: int) -> AdamWState:
    """One update (Loshchilov & Hutter 2019, algorithm 2).

    Args:
        state: before the step; both means are zero before the first.
        gradient: that the step uses, after clipping.
        settings: of this step.
        step: counted from 1, for the correction of the means' bias.
    """
    mean = settings.beta1 * state.mean + (1 - settings.beta1) * gradient
    square = settings.beta2 * state.square + (1 - settings.beta2) * gradient.square()
    direction = _unbiased(mean, settings.beta1, step) / (_root(square, settings, step) + settings.epsilon)
    decayed = (1 - settings.learning_rate * settings.weight_decay) * state.weight
    return AdamWState(decayed - settings.learning_rate * direction, mean, square)


def adamw_tangent(
    state: AdamWState,
    gradient: Tensor,
    change: AdamWState,
    gradient_change: Tensor,
    settings: AdamWSettings,
    step: int,
) -> AdamWState:
    """The first-order change of :func:`adamw_step`'s result.

    Where every gradient so far was zero, the root of the second moment has no derivative; 0 is taken.

    Args:
        state: before the step.
        gradient: that the step uses.
        change: of the state.
        gradient_change: of the gradient, whatever it comes from (the weight's own change included).
        settings: of this step.
        step: counted from 1.
    """
    after = adamw_step(state, gradient, settings, step)
    mean = settings.beta1 * change.mean + (1 - settings.beta1) * gradient_change
    square = settings.beta2 * change.square + 2 * (1 - settings.beta2) * gradient * gradient_change
    root = _root(after.square, settings, step)
    root_change = torch.where(root > 0, _unbiased(square, settings.beta2, step) / (2 * root), 0.0)
    divisor = root + settings.epsilon
    direction = _unbiased(after.mean, settings.beta1, step) / divisor
    direction_change = (_unbiased(mean, settings.beta1, step) - direction * root_change) / divisor
    decayed = (1 - settings.learning_rate * settings.weight_decay) * change.weight
    return AdamWState(decayed - settings.learning_rate * direction_change, mean, square)


@dataclass(frozen=True, kw_only=True)
class SGDSettings:
    """One step's settings; the decay is coupled: it is added to the gradient, as in ``torch.optim.SGD``."""

    learning_rate: float
    momentum: float = 0.0
    dampening: float = 0.0
    nesterov: bool = False
    weight_decay: float = 0.0


class SGDState(NamedTuple):
    """A weight with its momentum, or a change of the two."""

    weight: Tensor
    momentum: Tensor


def sgd_step(state: SGDState, gradient: Tensor, settings: SGDSettings, step: int) -> SGDState:
    """One update (Sutskever et al. 2013, equations 1 to 4, in torch's form: the learning rate scales the momentum).

    Args:
        state: before the step; the momentum is zero before the first.
        gradient: that the step uses, after clipping.
        settings: of this step.
        step: counted from 1; the first gradient enters the momentum without dampening.
    """
    gradient = gradient + settings.weight_decay * state.weight
    fresh = 1.0 if step == 1 else 1 - settings.dampening
    momentum = settings.momentum * state.momentum + fresh * gradient if settings.momentum else state.momentum
    direction = gradient + settings.momentum * momentum if settings.nesterov or not settings.momentum else momentum
    return SGDState(state.weight - settings.learning_rate * direction, momentum)


def sgd_tangent(change: SGDState, gradient_change: Tensor, settings: SGDSettings, step: int) -> SGDState:
    """The change of :func:`sgd_step`'s result, exact for changes of any size: the rule is linear, so it is its tangent.

    Args:
        change: of the state.
        gradient_change: of the gradient, whatever it comes from (the weight's own change included).
        settings: of this step.
        step: counted from 1.
    """
    return sgd_step(change, gradient_change, settings, step)


def merged_adamw(rates: Sequence[float], settings: AdamWSettings) -> AdamWSettings:
    """Settings of one step that stands for several: it forgets as much, and moves as far along a constant gradient.

    Args:
        rates: learning rates of the steps.
        settings: that they share otherwise.
    """
    count = len(rates)
    return replace(settings, learning_rate=sum(rates), beta1=settings.beta1**count, beta2=settings.beta2**count)


def merged_sgd(rates: Sequence[float], settings: SGDSettings) -> SGDSettings:
    """Settings of one step that stands for several. Heavy-ball momentum moves by rate / (1 - momentum) in the end,
    which stays the same; the merged step forgets as much as the steps together.

    Raises:
        ValueError: with dampening no such settings exist.
    """
    if settings.dampening and settings.momentum:
        raise ValueError("steps with dampening cannot be merged")
    momentum = settings.momentum ** len(rates)
    rate = sum(rates) * (1 - momentum) / (1 - settings.momentum) if settings.momentum < 1 else sum(rates)
    return replace(settings, learning_rate=rate, momentum=momentum)


def carried_into_merged(count: int, decay: float, *, averaged: bool) -> float:
    """By what a carried momentum is multiplied so that it moves the weights as far through merged steps as through the
    steps that they stand for.

    Args:
        count: steps merged into one.
        decay: momentum, or beta1.
        averaged: the momentum is a mean (Adam) and not a sum (SGD) of gradients.
    """
    if not decay or count == 1:
        return 1.0
    if averaged:  # a tail of m is worth rate * decay / (1 - decay)
        return decay * (1 - decay**count) / ((1 - decay) * count * decay**count)
    return decay / (count * decay**count)  # one of v, rate * decay / (1 - decay), at the merged rate


def _unbiased(moment: Tensor, beta: float, step: int) -> Tensor:
    return moment / (1 - beta**step)


def _root(square: Tensor, settings: AdamWSettings, step: int) -> Tensor:
    return _unbiased(square, settings.beta2, step).sqrt()
