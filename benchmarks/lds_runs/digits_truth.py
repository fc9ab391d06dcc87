"""Retraining the digits model on subsets: many models at once, stacked along a first axis, each with its own batches.

Three kinds of subsets:

half    100 random halves, 5 trainings of each with initial weights and orders of their own
five    40 subsets without a random 5 %; the recorded training again, the left-out examples' losses times 0
loo     the same without one example, each in turn; the difference is to the training with all (``base``)
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lds_runs import digits, digits_model
from lds_runs.testbed import Truth, kept, subsets

KINDS = ("half", "five", "loo")
HALVES, REPEATS, FIVES = 100, 5, 40
TOGETHER = 50  # models; decides rounding, so it is part of what a truth is


def ground_truth(config: str, kind: str, cache: Path, seed: int = 0, halves: int = HALVES) -> Truth:
    """Margins of the queries after training on subsets.

    Args:
        config: name of one of ``digits_model.CONFIGS``.
        kind: one of ``KINDS``; of ``loo`` the first mask keeps everything.
        cache: folder where truths are kept.
        seed: of the recorded training, which ``five`` and ``loo`` repeat.
        halves: how many subsets of kind ``half``.
    """
    if kind == "half":
        deciding = [config, HALVES, REPEATS, TOGETHER, halves]
        return kept(cache, f"digits-{config}-half", deciding, lambda: _halves(config, halves))
    deciding = [config, seed, FIVES, TOGETHER]
    return kept(cache, f"digits-{config}-{kind}-{seed}", deciding, lambda: _weighted(config, kind, seed))


def _halves(config: str, count: int) -> Truth:
    masks = subsets(count, digits_model.TRAIN, 0.5, seed=1)
    seeds = [1_000_000 + 1000 * subset + repeat for subset in range(count) for repeat in range(REPEATS)]
    members = np.repeat(np.stack([np.flatnonzero(mask) for mask in masks]), REPEATS, axis=0)

    def batches(first: int, last: int) -> tuple[Tensor, Tensor]:
        chosen = torch.from_numpy(members[first:last])
        places = torch.stack([digits_model.orders(s, chosen.shape[1]) for s in seeds[first:last]], 1)  # [T, M, B]
        rows = torch.stack([chosen[m][places[:, m]] for m in range(len(chosen))], 1)
        return rows, torch.ones(rows.shape)

    values = _trained(config, seeds, batches)
    return Truth(masks, values.reshape(count, REPEATS, -1))


def _weighted(config: str, kind: str, seed: int) -> Truth:
    masks = subsets(FIVES, digits_model.TRAIN, 0.95, seed=2)
    if kind == "loo":
        masks = ~np.eye(digits_model.TRAIN + 1, digits_model.TRAIN, -1, dtype=bool)
    order = digits_model.orders(seed)

    def batches(first: int, last: int) -> tuple[Tensor, Tensor]:
        rows = order[:, None].expand(-1, last - first, -1)
        weights_MN = torch.from_numpy(masks[first:last]).float()
        return rows, weights_MN.gather(1, order.reshape(1, -1).expand(last - first, -1)).reshape(
            last - first, *order.shape
        ).transpose(0, 1)

    return Truth(masks, _trained(config, [seed] * len(masks), batches)[:, None])


def _trained(config: str, seeds: list[int], batches: Callable[[int, int], tuple[Tensor, Tensor]]) -> np.ndarray:
    """Margins [M, Q] of a training from each seed; ``batches`` gives rows and loss weights [T, M, B] of some models."""
    found = []
    for first in range(0, len(seeds), TOGETHER):
        stack = _Stack(config, seeds[first : first + TOGETHER])
        stack.train(*batches(first, first + len(stack)))
        found.append(stack.margins())
    return torch.cat(found).numpy()


class _Stack:
    """Models of one configuration as parameters [M, ...]: the optimizers work by element, so each trains on its own."""

    def __init__(self, config: str, seeds: list[int]) -> None:
        self._setup, self._act = digits_model.CONFIGS[config], digits_model.CONFIGS[config].activation()
        models = [list(self._setup.model(seed).parameters()) for seed in seeds]
        self._parameters = [nn.Parameter(torch.stack(same).detach()) for same in zip(*models, strict=True)]

    def __len__(self) -> int:
        return len(self._parameters[0])

    def train(self, rows: Tensor, weights: Tensor) -> None:
        """All steps; rows and weights [T, M, B]."""
        pixels, labels = digits.data()[0]
        optimizer = self._setup.optimizer(self._parameters)
        for here, weight in zip(rows, weights, strict=True):
            losses = cross_entropy(self._logits(pixels[here]).transpose(1, 2), labels[here], reduction="none")
            (losses * weight).sum().div(digits_model.BATCH).backward()
            optimizer.step()
            optimizer.zero_grad()

    def margins(self) -> Tensor:
        """Of the queries, [M, Q]."""
        pixels, labels = digits.data()[1]
        with torch.no_grad():
            return digits_model.margins(self._logits(pixels.expand(len(self), -1, -1)), labels)

    def _logits(self, pixels: Tensor) -> Tensor:
        first, first_bias, second, second_bias = self._parameters
        hidden = self._act(torch.baddbmm(first_bias[:, None], pixels, first.transpose(1, 2)))
        return torch.baddbmm(second_bias[:, None], hidden, second.transpose(1, 2))
