"""Gradients that training throws away: what was captured of them must not become rows.

In a GAN the generator's backward pass also fills the gradients of the discriminator, which ``zero_grad()`` discards
before the discriminator's own backward pass. No hook tells of ``zero_grad``, of the model's or of an optimizer's, so
the gradients themselves are looked at when the next backward pass begins.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from trainer_attrib.capture.processes import is_sharded
from trainer_attrib.capture.window import Window
from trainer_attrib.tap.plan import SketchPlan


class DiscardedGradients:
    """Finds weights whose gradient was discarded since the last backward pass and drops their part of the window.

    A gradient that is gone was discarded. One that is there was if something wrote to it since the last backward pass
    and left only zeros (``zero_grad(set_to_none=False)``); to see that, and only then, the device is waited for.
    FSDP2 keeps gradients elsewhere while it accumulates, so that nothing can be told of sharded parameters.
    """

    def __init__(self, plan: SketchPlan, parameters: Mapping[str, nn.Parameter]) -> None:
        self._weights = [(w, parameters[w.name]) for w in plan.weights if not is_sharded(parameters[w.name])]
        self._left: dict[str, int] = {}  # by weight: its gradient's version when the last backward pass ended

    def forget(self, window: Window) -> None:
        """Call when a backward pass begins."""
        held = [(weight, parameter) for weight, parameter in self._weights if window.holds(weight.name)]
        gone = [weight for weight, parameter in held if self._is_gone(weight.name, parameter.grad)]
        if gone:
            window.forget(gone)

    def pass_ended(self) -> None:
        """Call when a backward pass has accumulated its gradients."""
        self._left = {w.name: p.grad._version for w, p in self._weights if p.grad is not None}

    def _is_gone(self, name: str, gradient: Tensor | None) -> bool:
        if gradient is None:
            return True
        written = gradient._version != self._left.get(name)
        return written and not gradient.is_sparse and not bool(gradient.any())
