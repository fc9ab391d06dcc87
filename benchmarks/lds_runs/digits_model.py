"""The digits perceptron and its training, with nothing but torch, so that a peer's Python can run it as well."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

TRAIN, CLASSES, WIDTH = 1000, 10, 64
BATCH, EPOCHS = 50, 30
Naming = Callable[[list[int]], AbstractContextManager[Any]]
"""Numbers of a batch's examples -> a context around its forward and backward pass."""


@dataclass(frozen=True)
class Config:
    """One way to train it.

    Args:
        name: shown in tables.
        adaptive: AdamW instead of SGD with momentum.
        smooth: GELU instead of ReLU.
    """

    name: str
    adaptive: bool
    smooth: bool

    def optimizer(self, parameters: Any) -> torch.optim.Optimizer:
        """A new one."""
        if self.adaptive:
            return torch.optim.AdamW(parameters, lr=2e-3, weight_decay=1e-2)
        return torch.optim.SGD(parameters, lr=0.03, momentum=0.9, weight_decay=1e-3)

    def activation(self) -> nn.Module:
        """Between the layers."""
        return nn.GELU() if self.smooth else nn.ReLU()

    def model(self, seed: int) -> nn.Module:
        """New weights."""
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return nn.Sequential(nn.Linear(64, WIDTH), self.activation(), nn.Linear(WIDTH, CLASSES))


CONFIGS = {
    c.name: c
    for c in (
        Config("sgdm", adaptive=False, smooth=False),
        Config("adamw", adaptive=True, smooth=False),
        Config("sgdm_gelu", adaptive=False, smooth=True),
        Config("adamw_gelu", adaptive=True, smooth=True),
    )
}


def orders(seed: int, examples: int = TRAIN) -> Tensor:
    """Numbers of the examples of every batch of a training, [steps, BATCH]."""
    generator = torch.Generator().manual_seed(seed)
    epochs = [torch.randperm(examples, generator=generator) for _ in range(EPOCHS)]
    return torch.cat([epoch[: examples // BATCH * BATCH] for epoch in epochs]).reshape(-1, BATCH)


def losses(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
    """Cross entropy of each example, [B]."""
    return cross_entropy(model(batch[0]), batch[1], reduction="none")


def margins(logits: Tensor, labels: Tensor) -> Tensor:
    """Logit of the label minus log-sum-exp of the others, [..., Q] of [..., Q, C] and [Q]."""
    index = labels.expand(logits.shape[:-1])[..., None]
    others = logits.scatter(-1, index, float("-inf"))
    return logits.gather(-1, index).squeeze(-1) - others.logsumexp(-1)


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, data: tuple[Tensor, ...], seed: int, naming: Naming
) -> None:
    """All steps on the data."""
    for rows in orders(seed):
        with naming(rows.tolist()):
            losses(model, tuple(part[rows] for part in data)).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
