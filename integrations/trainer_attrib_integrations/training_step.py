"""The loss that a Trainer's own ``training_step`` would backpropagate."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from trainer_attrib.errors import ConfigurationError
from trainer_attrib_integrations.wrapped import replaced


def loss_of_training_step(
    trainer: Any,
    training_step: Callable[..., Any],
    model: Any,
    batch: Any,
    items: Any,
    prepare: Callable[[Any], Any],
) -> Tensor:
    """What ``training_step`` hands to ``accelerator.backward``, so that overridden losses, autocast and the division by
    the accumulated micro-batches are the trainer's.

    Args:
        trainer: whose loss it is.
        training_step: its own, without what others put around it.
        model: prepared.
        batch: as the loader gives it.
        items: ``num_items_in_batch`` of the step.
        prepare: in place of the trainer's ``_prepare_inputs``.

    Raises:
        ConfigurationError: it takes the gradients itself.
    """
    losses: list[Tensor] = []
    with (
        replaced(trainer.accelerator, backward=lambda loss, **_: losses.append(loss)),
        replaced(trainer, _prepare_inputs=prepare),
    ):
        training_step(model, batch, items)
    if len(losses) != 1:
        raise ConfigurationError(
            f"{type(trainer).__name__}.training_step called accelerator.backward {len(losses)} times, not once.",
            cause="a training_step of the trainer's own takes the gradients itself.",
            fix="override compute_loss instead, or let the stage be retrained as a whole.",
        )
    return losses[0]
