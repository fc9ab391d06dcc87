"""Which examples to train on: boolean masks [M, N], the same on every machine and with every library version."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from trainer_attrib.errors import EvaluationError


def random_subsets(examples: int, count: int, share: float = 0.5, seed: int = 0) -> np.ndarray:
    """Random subsets of one size, drawn without replacement (Park et al. 2023, "TRAK", with half of the examples).

    The first subsets do not change when more are drawn.

    Args:
        examples: N.
        count: M.
        share: of the examples in each subset; the size is rounded down.
        seed: of the draw.

    Returns:
        Boolean [M, N].

    Raises:
        EvaluationError: no example, or every one, would be in a subset.
    """
    size = int(share * examples)
    if not 0 < size < examples:
        raise EvaluationError(
            f"Subsets of {size} of {examples} examples say nothing.", fix="choose a share between 0 and 1."
        )
    masks_MN = np.zeros((count, examples), bool)
    for number, mask_N in enumerate(masks_MN):
        draw = np.random.Philox(key=seed * 2**64 + number).random_raw(examples)  # a stream that numpy guarantees
        mask_N[np.argsort(draw, kind="stable")[:size]] = True
    return masks_MN


def all_but_one(examples: int, left_out: Sequence[int] | None = None) -> np.ndarray:
    """Everything but one example, boolean [M, N]: one subset for each of ``left_out``, of all N by default."""
    out = np.arange(examples) if left_out is None else np.asarray(left_out, int)
    masks_MN = np.ones((len(out), examples), bool)
    masks_MN[np.arange(len(out)), out] = False
    return masks_MN


def all_but_one_group(groups: Sequence[Any]) -> tuple[np.ndarray, list[Any]]:
    """Everything but the examples of one group.

    Args:
        groups: the group of each example [N]: a source, a cluster, a class.

    Returns:
        Boolean [M, N] and the groups that were left out [M], in the order in which they appear.
    """
    names = list(dict.fromkeys(groups))
    return np.array([[group != name for group in groups] for name in names]), names
