"""The self-audit: does what was captured explain the gradient that the optimizer used?"""

from __future__ import annotations

import torch
from torch import Tensor


def regress(gradient_K: Tensor, captured_K: Tensor) -> tuple[Tensor, Tensor]:
    """Least-squares scale and relative residual of ``gradient ~ scale * captured``.

    ``captured`` is the sum of a step's row sketches of one weight, ``gradient`` the sketch of its ``.grad``. A residual
    of rounding size proves that no contribution was missed; the scale is the product of everything that acts after
    the backward pass: clipping, loss unscaling, averaging over processes.

    Returns:
        scale and residual, 0-dim; both NaN where either side is zero or non-finite.
    """
    gradient_K, captured_K = gradient_K.flatten().double(), captured_K.flatten().double()
    power = captured_K @ captured_K
    size = gradient_K.norm()
    scale = (gradient_K @ captured_K) / power
    residual = (gradient_K - scale * captured_K).norm() / size
    known = torch.isfinite(scale) & torch.isfinite(residual) & (size > 0)
    missing = torch.full_like(scale, float("nan"))
    return torch.where(known, scale, missing), torch.where(known, residual, missing)
