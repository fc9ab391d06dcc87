"""By how much did the trainer divide each example's loss? Measured, because no convention can be trusted.

`Trainer` passes ``num_items_in_batch``, but some models ignore it and some counts include positions without a loss.
For a cross entropy the answer is in the gradient itself: at one target position the gradient of the logits is
``(softmax - onehot) / denominator``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trainer_attrib.capture.example_ids import IGNORED


class DenominatorProbe:
    """Watches one forward's output; after the backward pass ``value`` and ``misfit`` are 0-dim tensors.

    ``misfit`` is 0 where the loss is a plain cross entropy and the value can be trusted, about 1 where it is not.
    """

    def __init__(self) -> None:
        self.value: Tensor | None = None
        self.misfit: Tensor | None = None

    @staticmethod
    def watch(output: Any, labels: Any) -> DenominatorProbe | None:
        """A probe on the output's ``log_probs`` (TRL's fused head) or ``logits``, if they carry a gradient."""
        log_probs, logits = (_differentiable(output, name) for name in ("log_probs", "logits"))
        probe = DenominatorProbe()
        if log_probs is not None:
            log_probs.register_hook(probe._from_log_probs)
            return probe
        if logits is None or not isinstance(labels, Tensor):
            return None
        located = _first_target(logits.detach(), labels)
        if located is None:
            return None
        logits.register_hook(lambda gradient: probe._from_logits(gradient, *located))
        return probe

    def result(self) -> float | None:
        """The measured denominator, or None where the loss is not a plain cross entropy. Waits for the device."""
        if self.value is None or self.misfit is None or not float(self.misfit) < 1e-3:
            return None
        return float(self.value)

    @torch.no_grad()
    def _from_log_probs(self, gradient: Tensor | None) -> None:
        """A plain sum divided by D has gradient -1/D at every counted token and 0 elsewhere."""
        if gradient is None:
            return  # what compiled code returned beside the loss that it computed from its own log-probabilities
        counted = gradient != 0
        self.value = -counted.sum() / gradient.sum()
        self.misfit = ((gradient * self.value + 1) * counted).abs().max()

    @torch.no_grad()
    def _from_logits(self, gradient: Tensor | None, index: Tensor, row_V: Tensor, target: Tensor) -> None:
        if gradient is None:
            return  # as above
        expected_V = row_V.double().softmax(-1)
        expected_V[target] -= 1
        found_V = gradient.reshape(-1, gradient.shape[-1])[index].double()
        product = expected_V @ found_V
        self.value = (expected_V @ expected_V) / product
        self.misfit = 1 - product / (expected_V.norm() * found_V.norm())


def count_targets(labels: Any) -> Tensor | None:
    """Target tokens of each row of causal-LM labels [B, S], or None for other labels."""
    if not isinstance(labels, Tensor) or labels.dim() != 2 or labels.is_floating_point():
        return None
    return (labels[:, 1:] != IGNORED).sum(1)


def _differentiable(output: Any, name: str) -> Tensor | None:
    value = output.get(name) if isinstance(output, dict) else getattr(output, name, None)
    return value if isinstance(value, Tensor) and value.requires_grad else None


def _first_target(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
    """Flat index, logits [V] and label of the first counted target, without waiting for the device."""
    if labels.is_floating_point() or logits.shape[:-1] != labels.shape:
        return None
    if labels.dim() == 2:  # causal: the logits of a position predict the next label
        labels = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED)
    flat = labels.reshape(-1)
    index = (flat != IGNORED).int().argmax()
    return index, logits.reshape(-1, logits.shape[-1])[index].clone(), flat[index].clamp_min(0)
