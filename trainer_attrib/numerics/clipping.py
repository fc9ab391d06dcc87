"""Which clipping turned one gradient into another, and the adjoint of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_ADDED = 1e-6  # to the norm, by torch.nn.utils.clip_grad_norm_


@dataclass(frozen=True)
class Clipping:
    """How a gradient was clipped, as its result tells.

    Args:
        factor: the whole gradient was multiplied by ``bound / norm``, which is this; 1 where nothing was clipped.
        kept: one mask per weight of the entries that were not clamped to a value; empty where none were.
    """

    factor: float = 1.0
    kept: Sequence[Tensor] = ()

    def adjoint(self, gradient: Sequence[Tensor], adjoint: Sequence[Tensor]) -> list[Tensor]:
        """Derivatives with respect to the gradient before clipping from those with respect to the clipped one.

        Args:
            gradient: before clipping, one tensor per weight.
            adjoint: of the clipped gradient; may have one leading axis, of queries.
        """
        if self.kept:
            return [a * mask for a, mask in zip(adjoint, self.kept, strict=True)]
        if self.factor == 1.0:
            return list(adjoint)
        pairs = list(zip(gradient, adjoint, strict=True))
        square = sum(float(g.double().square().sum()) for g in gradient)
        along = torch.stack([(g * a).flatten(a.dim() - g.dim()).sum(-1) for g, a in pairs]).sum(0)
        slope = self.factor * along / (square + _ADDED * square**0.5)
        return [self.factor * a - slope.reshape(slope.shape + (1,) * g.dim()) * g for g, a in pairs]


def clipping_of(before: Sequence[Tensor], after: Sequence[Tensor]) -> Clipping | None:
    """The clipping that turned one gradient into the other: to a norm of all weights together, to a value, or none.

    Args:
        before: one tensor per weight.
        after: the same.

    Returns:
        None where it is of another kind.
    """
    pairs = list(zip(before, after, strict=True))
    if all(torch.equal(b, a) for b, a in pairs):
        return Clipping()
    inner = sum(float((b.double() * a.double()).sum()) for b, a in pairs)
    square = sum(float(b.double().square().sum()) for b in before)
    factor = inner / square if square > 0 else 0.0
    size = sum(float(a.double().square().sum()) for a in after)
    off = sum(float((a.double() - factor * b.double()).square().sum()) for b, a in pairs)
    tolerance = torch.finfo(before[0].dtype).eps ** 0.5
    if 0 < factor < 1 and off <= tolerance**2 * size:
        return Clipping(factor=factor)
    kept = [a == b for b, a in pairs]
    clamped = torch.cat([a[~mask].abs() for mask, a in zip(kept, after, strict=True)])
    shrunk = all(bool((b * a >= a * a).all()) for b, a in pairs)
    bound = max(float(a.abs().max()) for a in after)
    return Clipping(kept=kept) if shrunk and bool((clamped == bound).all()) else None
