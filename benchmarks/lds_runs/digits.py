"""A perceptron 64-64-10 on 1000 of scikit-learn's digits, asked about 100 others: seconds to train a thousand times.

Batches of 50 for 30 epochs, a constant learning rate, float32. The behavior of a query is the margin of its class, the
logit minus the logarithm of the sum of the others' exponentials (Park et al. 2023, section 3.1). 4810 parameters.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from stage_runs.digits import images
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lds_runs.testbed import RANK, SNAPSHOTS, STAGE, Trained, restore
from trainer_attrib import Behavior, Ledger, Recorder, SketchConfig

TRAIN, TEST, CLASSES, WIDTH = 1000, 100, 10, 64
BATCH, EPOCHS = 50, 30


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


@cache
def data() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Pixels from 0 to 1 [N, 64] and labels [N] to train on, and to ask about."""
    pixels, labels = images()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    train, test = order[:TRAIN], order[TRAIN : TRAIN + TEST]
    return (pixels[train].flatten(1), labels[train]), (pixels[test].flatten(1), labels[test])


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


def behavior() -> Behavior:
    """The margin of each query."""
    pixels, labels = data()[1]
    queries = [f"#{i}: class {int(label)}" for i, label in enumerate(labels)]
    items = list(zip(pixels, labels, strict=True))
    return Behavior("margin", items, _measure, queries, batch_size=TEST, unit="logits")


def trained(config: str, seed: int, cache: Path) -> Trained:
    """The recorded training, run unless the folder holds it."""
    setup, train, test = CONFIGS[config], *data()
    ledger, ids = cache / f"digits-{config}-{seed}", [f"digit-{i:04d}" for i in range(TRAIN)]
    model = setup.model(seed)
    if not (ledger / "done").exists():
        optimizer = setup.optimizer(model.parameters())
        with Recorder(
            ledger, stage=STAGE, model=model, optimizer=optimizer, sketch=SketchConfig(rank=RANK),
            snapshots=SNAPSHOTS, total_steps=len(orders(seed)), strict=True,
        ) as recorder:  # fmt: skip
            _train(model, optimizer, seed, lambda rows: recorder.batch(ids=[ids[i] for i in rows]))
        (ledger / "done").touch()
    weights = Ledger(ledger).stage(STAGE).snapshot("end")
    return Trained(config, seed, restore(model, weights), ledger, ids, train, test, losses, behavior())


def train_plainly(config: str, seed: int) -> nn.Module:
    """The same training without a recording: what costs are measured against."""
    model = CONFIGS[config].model(seed)
    _train(model, CONFIGS[config].optimizer(model.parameters()), seed, lambda rows: nullcontext())
    return model


def _train(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int, naming: Callable[[list[int]], Any]) -> None:
    train = data()[0]
    for rows in orders(seed):
        with naming(rows.tolist()):
            losses(model, tuple(part[rows] for part in train)).mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def _measure(model: nn.Module, items: list[Any]) -> Tensor:
    pixels, labels = (torch.stack(column) for column in zip(*items, strict=True))
    return margins(model(pixels), labels)
