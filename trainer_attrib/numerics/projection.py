"""Seeded projections that are the same on every device, in every process and with every library version."""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from torch import Tensor


def projection(seed: int, name: str, shape: tuple[int, int], axis: int, rank: int) -> Tensor:
    """Rademacher projection of one axis of a weight, a function of its arguments alone.

    Entries are +-1/sqrt(K), so that the expectation of ``P.T @ P`` is the identity and inner products are kept in
    expectation (Achlioptas 2003, theorem 1.1). Signs are the bits of numpy's Philox stream, whose values numpy
    guarantees, keyed by a hash of the arguments. An axis no longer than ``rank`` is kept exactly.

    Args:
        seed: of the whole sketch.
        name: canonical name of the weight's parameter.
        shape: [R, C] of the weight (bias included).
        axis: 0 for the rows' projection, 1 for the columns'.
        rank: K.

    Returns:
        float64 [min(K, D), D] on the CPU, D = shape[axis].
    """
    length = shape[axis]
    if length <= rank:
        return torch.eye(length, dtype=torch.float64)
    digest = hashlib.blake2b(f"{seed}|{name}|{shape[0]}x{shape[1]}|{axis}|{rank}".encode(), digest_size=16).digest()
    words = np.random.Philox(key=int.from_bytes(digest, "little")).random_raw(-(-rank * length // 64))
    bits = np.unpackbits(words.astype("<u8").view(np.uint8), count=rank * length, bitorder="little")
    signs_KD = torch.from_numpy(bits.reshape(rank, length)).double().mul_(2).sub_(1)
    return signs_KD.div_(rank**0.5)
