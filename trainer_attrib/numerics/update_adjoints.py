"""Adjoints of the update rules: from the derivative with respect to a step's result to that with respect to what the
step began with. They are the transposes of the tangents in :mod:`~trainer_attrib.numerics.update_rules`.

Adjoints may have leading axes that states and gradients do not have: one adjoint per query.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trainer_attrib.numerics.update_rules import AdamWSettings, AdamWState, SGDSettings, SGDState, adamw_step


def adamw_adjoint(
    state: AdamWState, gradient: Tensor, adjoint: AdamWState, settings: AdamWSettings, step: int
) -> tuple[AdamWState, Tensor]:
    """Transpose of :func:`~trainer_attrib.numerics.update_rules.adamw_tangent`.

    Args:
        state: before the step.
        gradient: that the step uses.
        adjoint: derivative with respect to the state after the step.
        settings: of this step.
        step: counted from 1.

    Returns:
        The derivatives with respect to the state before the step and with respect to the gradient. What the gradient
        depends on (the weight) is not in the former.
    """
    after = adamw_step(state, gradient, settings, step)
    unbias_mean, unbias_square = 1 - settings.beta1**step, 1 - settings.beta2**step
    root = (after.square / unbias_square).sqrt()
    divisor = root + settings.epsilon
    direction = after.mean / unbias_mean / divisor
    of_direction = -settings.learning_rate * adjoint.weight / divisor
    mean = adjoint.mean + of_direction / unbias_mean
    by_square = torch.where(root > 0, direction / (2 * unbias_square * root), 0.0)
    square = adjoint.square - of_direction * by_square
    before = AdamWState(
        (1 - settings.learning_rate * settings.weight_decay) * adjoint.weight,
        settings.beta1 * mean,
        settings.beta2 * square,
    )
    return before, (1 - settings.beta1) * mean + 2 * (1 - settings.beta2) * gradient * square


def sgd_adjoint(adjoint: SGDState, settings: SGDSettings, step: int) -> tuple[SGDState, Tensor]:
    """Transpose of :func:`~trainer_attrib.numerics.update_rules.sgd_tangent`.

    Args:
        adjoint: derivative with respect to the state after the step.
        settings: of this step.
        step: counted from 1.

    Returns:
        The derivatives with respect to the state before the step and with respect to the gradient. What the gradient
        depends on (the weight) is not in the former, but for the decay.
    """
    of_direction = -settings.learning_rate * adjoint.weight
    if not settings.momentum:
        momentum, gradient = adjoint.momentum, of_direction
    else:
        of_buffer = adjoint.momentum + (settings.momentum if settings.nesterov else 1.0) * of_direction
        momentum = settings.momentum * of_buffer
        gradient = (1.0 if step == 1 else 1 - settings.dampening) * of_buffer
        if settings.nesterov:
            gradient = gradient + of_direction
    return SGDState(adjoint.weight + settings.weight_decay * gradient, momentum), gradient
