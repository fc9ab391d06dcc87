"""Ids from content: the same example has the same id whatever batch, epoch, worker or padding it came with."""

from __future__ import annotations

from hashlib import blake2b

import numpy as np
import torch
from torch import Tensor

IGNORED = -100  # the label that every Hugging Face loss skips
_MULTIPLIERS: dict[tuple[int, torch.device], Tensor] = {}
_INPUT_STREAM, _LABEL_STREAM = 1, 2


@torch.no_grad()
def hash_rows(tokens: Tensor, mask: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
    """64-bit content hash of each row, on the rows' device and without waiting for it.

    A multilinear hash modulo 2^64 (Lemire & Kaser 2014) over positions counted among unmasked entries, so that left
    and right padding do not matter, followed by a mixing step. n different rows collide with odds of about n^2 / 2^65.

    Args:
        tokens: [B, ...]; floating values are hashed by their bits.
        mask: [B, S], nonzero where a token is not padding.
        labels: [B, S], part of the identity because the loss depends on them; a first label that repeats its own token
            is not, as no causal loss has it for a target and packing masks it.

    Returns:
        int64 [B].
    """
    values = _as_integers(tokens)
    keep = torch.ones_like(values, dtype=torch.bool) if mask is None else mask.bool()
    if keep.shape != values.shape:
        keep = torch.ones_like(values, dtype=torch.bool)
    position = (keep.long().cumsum(1) - 1).clamp_min(0)
    hashed = _mix(_weighted(values, position, keep, _INPUT_STREAM) + keep.sum(1))
    if labels is not None and labels.shape == values.shape:
        targets = _as_integers(labels)
        targets = torch.where((position == 0) & (targets == values), IGNORED, targets)
        hashed = _mix(hashed + _weighted(targets, position, keep, _LABEL_STREAM))
    elif labels is not None and labels.shape[0] == values.shape[0]:
        hashed = _mix(hashed ^ hash_rows(labels))
    return hashed


def side_hashes(hashes: Tensor, sides: int) -> Tensor:
    """Hash of each example of a concatenated batch, rows i, i + n/sides, ...; with one side the rows' own."""
    first, *others = hashes.chunk(sides)
    for other in others:
        first = _mix(first + 31 * other)
    return first


def id_strings(hashes: Tensor) -> list[str]:
    """Hashes as 16 hexadecimal digits."""
    return [f"{value & 0xFFFFFFFFFFFFFFFF:016x}" for value in hashes.tolist()]


def sampled(example: str, share: float) -> bool:
    """Whether an example belongs to the sample that holds this share of all examples, decided by its id alone."""
    return int.from_bytes(blake2b(example.encode(), digest_size=8).digest()) < share * 2**64


def _as_integers(values: Tensor) -> Tensor:
    values = values.reshape(values.shape[0], -1)
    if values.is_floating_point():
        return values.float().contiguous().view(torch.int32).long()
    return values.long()


def _weighted(values: Tensor, position: Tensor, keep: Tensor, stream: int) -> Tensor:
    return ((values + 101) * _multipliers(stream, values.shape[1], values.device)[position] * keep).sum(1)


def _multipliers(stream: int, length: int, device: torch.device) -> Tensor:
    """Odd 64-bit multipliers; a longer table begins with the shorter one, so ids do not depend on padded lengths."""
    known = _MULTIPLIERS.get((stream, device))
    if known is None or len(known) < length:
        words = np.random.Philox(key=stream).random_raw(max(4096, 1 << (length - 1).bit_length()))
        known = torch.from_numpy((words | np.uint64(1)).view(np.int64).copy()).to(device)
        _MULTIPLIERS[stream, device] = known
    return known


def _mix(h: Tensor) -> Tensor:
    """Finaliser of splitmix64 (Steele et al. 2014); shifts are made logical by masking."""
    h = (h ^ ((h >> 30) & 0x3FFFFFFFF)) * -4658895280553007687
    h = (h ^ ((h >> 27) & 0x1FFFFFFFFF)) * -7723592293110705685
    return h ^ ((h >> 31) & 0x1FFFFFFFF)
