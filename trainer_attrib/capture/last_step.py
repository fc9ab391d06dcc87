"""Whether the weights with which a stage ends are those that its last step left."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from trainer_attrib.tap.shards import shard_of

_WATCHED = 4


class LastStep:
    """Keeps a few small weights as the last step left them.

    Averaged weights (EMA, SWA) and the best checkpoint are put into a model when its steps are over, by ways that leave
    no other trace: ``weight.data.copy_`` counts no version. They change every weight that training changes, so that
    the smallest ones tell.

    Args:
        parameters: that the stage trains.
    """

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        held = {parameter: shard_of(parameter.data).local.numel() for parameter in parameters}
        self._watched = sorted((parameter for parameter in held if held[parameter]), key=lambda one: held[one])[
            :_WATCHED
        ]
        self._left: list[Tensor] = []

    def note(self) -> None:
        """A step has been taken."""
        if not self._left:
            self._left = [weight.clone() for weight in self._now]
        for then, now in zip(self._left, self._now, strict=True):
            then.copy_(now)

    @property
    def replaced(self) -> bool:
        """Whether something else has changed the weights since; waits for the device."""
        pairs = zip(self._left, self._now, strict=False)
        return not all(torch.allclose(then, now.to(then.device), rtol=0, atol=0, equal_nan=True) for then, now in pairs)

    @property
    def _now(self) -> list[Tensor]:
        return [shard_of(parameter.data).local for parameter in self._watched]  # `data` may be another one by now
