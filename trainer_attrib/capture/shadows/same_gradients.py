"""Whether a step's gradients are those that were backpropagated."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from trainer_attrib.errors import CaptureError

Norms = Sequence[tuple[Tensor, float]]
"""Norm before clipping and threshold, for each time that the step's gradient was clipped."""

_TOLERANCE = 0.01
"""By how much norms may differ: half precision rounds, and what changes a gradient less does a shadow no harm."""


class SameGradients:
    """Finds by the gradients' norm what was done to them between their backward pass and the step, untold.

    A shadow makes its gradients from the model's, so that it would be wrong without anybody noticing.

    Args:
        parameters: that the optimizer updates.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self._parameters = list(parameters)
        self._norm: Tensor | None = None

    def backpropagated(self, scale: Tensor | None) -> None:
        """Call after each backward pass of a step.

        Args:
            scale: by what the losses were multiplied.
        """
        norm = self._now()
        self._norm = norm if scale is None else norm / scale.to(norm.device)

    def check(self, norms: Norms) -> None:
        """Call after the step.

        Args:
            norms: of its clipping.

        Raises:
            CaptureError: they were changed.
        """
        expected, self._norm = self._norm, None
        clipped = clipping(norms)
        if expected is None:
            return
        expected = expected if clipped is None else expected * clipped[0].to(expected.device)
        found = self._now()
        if bool(((found - expected).abs() > _TOLERANCE * expected) & expected.isfinite()):
            raise CaptureError(
                f"The step used gradients of norm {float(found):.4g}; those backpropagated give {float(expected):.4g}.",
                cause="they were clipped without a word, or changed by something else; or not every loss of the step "
                "was told.",
                fix="tell the norm before clipping: recorder.note_gradient_norm(norm, threshold).",
            )

    def _now(self) -> Tensor:
        return torch.nn.utils.get_total_norm([p.grad for p in self._parameters if p.grad is not None])


def clipping(norms: Norms) -> tuple[Tensor, float] | None:
    """By what the step's gradient was multiplied, and the threshold.

    Raises:
        CaptureError: it was clipped several times, by rules that the shadow would have to follow one after the other.
    """
    if not norms:
        return None
    if len(norms) > 1:
        raise CaptureError(f"The step's gradient was clipped {len(norms)} times.", fix="clip it once.")
    norm, threshold = norms[0]
    return clip_factor(norm, threshold), threshold


def clip_factor(norm: Tensor, threshold: float) -> Tensor:
    """As ``torch.nn.utils.clip_grad_norm_`` has it."""
    return (threshold / (norm + 1e-6)).clamp(max=1.0)
