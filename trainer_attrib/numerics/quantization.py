"""Numbers as whole ones of eight bits and a scale for each block of them."""

from __future__ import annotations

import torch
from torch import Tensor

LEVELS = 127  # of either sign: -128 is left out, so that a row and its negative are told alike


def quantize(blocks_NMK: Tensor) -> tuple[Tensor, Tensor]:
    """Whole numbers and scales whose products are within half a scale of the blocks' numbers.

    Args:
        blocks_NMK: M blocks of K numbers of each of N rows. Blocks that are not finite get scales that are not.

    Returns:
        int8 [N, M, K], and the blocks' largest sizes over 127, [N, M].
    """
    scale_NM = blocks_NMK.abs().amax(2) / LEVELS
    safe_NM = torch.where(torch.isfinite(scale_NM) & (scale_NM > 0), scale_NM, torch.ones_like(scale_NM))
    whole_NMK = torch.nan_to_num(blocks_NMK / safe_NM[:, :, None]).round().clamp(-LEVELS, LEVELS)
    return whole_NMK.to(torch.int8), scale_NM


def dequantize(whole_NMK: Tensor, scale_NM: Tensor) -> Tensor:
    """Inverse of :func:`quantize`, float32 [N, M, K]."""
    return whole_NMK.float() * scale_NM[:, :, None]
