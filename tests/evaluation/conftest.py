"""A world in which every effect is known: weights are sums over examples, behaviors are linear in the weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from trainer_attrib.analysis.behavior import Behavior
from trainer_attrib.analysis.examples import Examples
from trainer_attrib.evaluation.counterfactual import Retrained


@dataclass
class World:
    """Examples x [N, D] and queries q [Q, D]; training is one step of size 1 on the loss -w.x of every example."""

    examples: torch.Tensor
    queries: torch.Tensor
    noise: float = 0.0
    trained: list[tuple[tuple[int, ...], int]] = field(default_factory=list)

    @property
    def effects(self) -> np.ndarray:
        """What training on each example adds to each behavior, [Q, N]."""
        return (self.queries @ self.examples.T).numpy()

    @property
    def ids(self) -> list[str]:
        return [f"row-{n}" for n in range(len(self.examples))]

    @property
    def data(self) -> Examples:
        return Examples(list(self.examples), self.losses, self.ids)

    @property
    def behavior(self) -> Behavior:
        return Behavior("dot", list(self.queries), lambda model, items: model(torch.stack(items)).squeeze(1))

    def model(self) -> nn.Linear:
        model = nn.Linear(self.examples.shape[1], 1, bias=False, dtype=torch.float64)
        nn.init.zeros_(model.weight)
        return model

    def losses(self, model: nn.Module, items: list[Any]) -> torch.Tensor:
        return -model(torch.stack(items)).squeeze(1)

    def train(self, positions: np.ndarray, seed: int) -> nn.Module:
        self.trained.append((tuple(int(i) for i in positions), seed))
        model = self.model()
        tuner = torch.optim.SGD(model.parameters(), lr=1.0)
        self.losses(model, list(self.examples[positions])).sum().backward()
        tuner.step()
        drawn = torch.Generator().manual_seed(1000 * seed + int(positions.sum()))
        with torch.no_grad():
            model.weight += self.noise * torch.randn(model.weight.shape, generator=drawn, dtype=torch.float64)
        return model

    def behavior_of(self, subsets: np.ndarray, seed: int) -> np.ndarray:
        """What the models of these subsets do, [M, Q], from models that are trained here and not counted."""
        counted, self.trained = self.trained, []
        values = [self.behavior.values(self.train(np.flatnonzero(mask), seed)).numpy() for mask in subsets]
        self.trained = counted
        return np.stack(values)

    def store(self, folder: Path, *, behaviors: Sequence[Behavior] | None = None, **options: Any) -> Retrained:
        options = {"recipe": "one step", "train": self.train} | options
        return Retrained(folder, behaviors or [self.behavior], options.pop("examples", self.ids), **options)


@pytest.fixture
def world() -> Callable[..., World]:
    def make(examples: int = 12, queries: int = 3, width: int = 20, noise: float = 0.0, seed: int = 0) -> World:
        drawn = torch.Generator().manual_seed(seed)
        return World(
            torch.randn(examples, width, generator=drawn, dtype=torch.float64),
            torch.randn(queries, width, generator=drawn, dtype=torch.float64),
            noise,
        )

    return make
