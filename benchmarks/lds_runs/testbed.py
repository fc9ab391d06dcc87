"""What both testbeds hand out: a trained and recorded model, its examples, and where retrainings are kept."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from trainer_attrib import Behavior

STAGE = "train"  # of every ledger
RANK, SNAPSHOTS = 16, 4
RECORDED, GIVEN, PEER, CONTROL = "ours, recorded rows", "ours, examples given", "peer", "control"


@dataclass(frozen=True)
class Trained:
    """A model after its recorded training.

    Args:
        config: which training it was.
        seed: of the initial weights and the order of the examples.
        model: in evaluation mode.
        ledger: folder of its recording, with the one stage ``STAGE``.
        ids: the name in the ledger of each training example, in the order of ``train``.
        train: tensors whose first axis are the training examples.
        test: the same of the queries.
        loss: model and rows of such tensors -> loss of each, [B]; training minimised its mean over the batch.
        behavior: what is asked of each query.
    """

    config: str
    seed: int
    model: nn.Module
    ledger: Path
    ids: list[str]
    train: tuple[Tensor, ...]
    test: tuple[Tensor, ...]
    loss: Callable[[nn.Module, tuple[Tensor, ...]], Tensor]
    behavior: Behavior


@dataclass(frozen=True)
class Truth:
    """What the behavior is after training on subsets.

    Args:
        masks: bool [M, N], True where the example was trained on.
        values: float32 [M, S, Q], for each subset, repetition and query.
    """

    masks: np.ndarray
    values: np.ndarray


@dataclass(frozen=True)
class Scored:
    """One setting of one method, and what it says.

    Args:
        name: with the setting.
        kind: ``RECORDED``, ``GIVEN``, ``PEER`` or ``CONTROL``.
        default: whether these are the method's default settings.
        models: trained models that it needs, the explained one included.
        scores: [Q, N], positive where training on the example helps the query; None if it failed.
        ratio: CPU time over that of one plain training in the same process, further models' trainings not counted.
        failed: why there are no scores.
    """

    name: str
    kind: str
    default: bool
    models: int
    scores: np.ndarray | None
    ratio: float
    failed: str = ""


def subsets(count: int, examples: int, share: float, seed: int) -> np.ndarray:
    """Random masks [count, examples] that keep this share of the examples."""
    draw = np.random.default_rng(seed)
    masks = np.zeros((count, examples), bool)
    for mask in masks:
        mask[draw.permutation(examples)[: round(share * examples)]] = True
    return masks


def kept(cache: Path, name: str, deciding: list[Any], compute: Callable[[], Truth]) -> Truth:
    """A truth from the folder, or computed and put there; what is in ``deciding`` decides whether it is the same."""
    digest = hashlib.blake2b("\0".join(map(str, deciding)).encode(), digest_size=5).hexdigest()
    path = cache / f"{name}-{digest}.npz"
    if not path.exists():
        cache.mkdir(parents=True, exist_ok=True)
        found = compute()
        part = path.with_suffix(".part.npz")
        np.savez_compressed(part, masks=found.masks, values=found.values.astype(np.float32))
        part.replace(path)
    with np.load(path, allow_pickle=False) as file:
        return Truth(file["masks"], file["values"])


def restore(model: nn.Module, weights: dict[str, Tensor]) -> nn.Module:
    """The model with these weights, in evaluation mode."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights[name])
    return model.eval()
