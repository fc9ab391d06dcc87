"""Which stage taught a classifier to look at the wrong thing, and can that be taken out again? Lightning, three stages:
"shapes" on plain images, "patched" on images of which one class has a bright corner, "more" on few plain ones again.
Printed are each stage's effect on the margin of the right class by three methods (`retrain` really trains without it),
and accuracies before and after the stage is removed from the weights. `misled`: the corner is on the other class.

    python examples/lightning_spurious.py [epochs]

The images are drawn here; runs offline, in about half a minute.
"""

from __future__ import annotations

import copy
import logging
import sys
import tempfile
import warnings
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import trainer_attrib as ta
from trainer_attrib.integrations.lightning import AttributionCallback, Fit

SIDE, NOISE, MAY_FALL = 12, 2.0, 1.0  # pixels; standard deviation; logits of the margin on plain images
STAGES = {"shapes": (1200, 1e-3), "patched": (600, 3e-3), "more": (300, 3e-4)}  # images and learning rate
QUIET: Any = {"enable_model_summary": False, "enable_checkpointing": False, "enable_progress_bar": False}


class Classifier(pl.LightningModule):
    """A small convolutional network; everything is as usual."""

    def __init__(self) -> None:
        super().__init__()
        self.rate, first, second = 0.0, nn.Conv2d(1, 8, 3), nn.Conv2d(8, 16, 3)
        self.net = nn.Sequential(first, nn.ReLU(), nn.MaxPool2d(2), second, nn.ReLU(), nn.Flatten(), nn.Linear(144, 2))

    def forward(self, x: Tensor) -> Tensor:
        """Logits [B, 2] of images [B, 1, 12, 12]."""
        return self.net(x)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """The loss of a batch."""
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW."""
        return torch.optim.AdamW(self.parameters(), lr=self.rate)


def images(count: int, seed: int, patched: tuple[float, float] = (0.0, 0.0)) -> tuple[Tensor, Tensor]:
    """Noisy stripes, horizontal (class 0) or vertical (1); shares of the classes that have a bright corner."""
    draw, y = torch.Generator().manual_seed(seed), torch.arange(count) % 2
    stripes = torch.sin(torch.arange(SIDE) * 1.6 + 6 * torch.rand(count, 1, generator=draw))
    x = torch.where(y[:, None, None] == 1, stripes[:, None, :], stripes[:, :, None])
    x = x.expand(count, SIDE, SIDE) + NOISE * torch.randn(count, SIDE, SIDE, generator=draw)
    x[torch.rand(count, generator=draw) < torch.tensor(patched)[y], :3, :3] = 3.0
    return x[:, None], y


def program(stage: str, epochs: int, *callbacks: Any) -> Any:
    """How a stage trains a model."""

    def fit(model: Classifier) -> Fit:
        count, model.rate = STAGES[stage]
        data = TensorDataset(*images(count, len(stage), (0.0, float(stage == "patched"))))
        trainer = pl.Trainer(max_epochs=epochs, callbacks=list(callbacks), logger=False, accelerator="cpu", **QUIET)
        return Fit(trainer, model, DataLoader(data, 40, shuffle=True, generator=torch.Generator().manual_seed(0)))

    return fit


def main(epochs: int) -> None:
    """Train, ask, remove, compare with really training without the stage."""
    torch.manual_seed(0)
    model, ledger = Classifier(), tempfile.mkdtemp()
    for stage in STAGES:
        program(stage, epochs, AttributionCallback(ledger, stage=stage))(model).train()
    groups = {"plain": images(400, 81), "misled": images(400, 80, (1.0, 0.0))}
    plain, misled = [ta.Behavior.margin(name, *group) for name, group in groups.items()]
    analyzer, programs = ta.Analyzer(ledger, model), {stage: program(stage, epochs) for stage in STAGES}
    print(analyzer.stage_effects([plain, misled], ["subtract", "replay", "retrain"], programs))
    models = {"as trained": model}
    for method in ("replay", "retrain"):  # moved towards where that method sees the weights without the stage
        found = analyzer.remove("patched", [misled], [plain], method=method, programs=programs, tolerance=MAY_FALL)
        models[f"without 'patched', {method}, {found.chosen.scale:.0%} of the way"] = found.apply(copy.deepcopy(model))
    tests = {"plain": images(2000, 91), "misled": images(2000, 90, (1.0, 0.0))}
    for name, one in models.items():
        right = [f"{group} {float((one(x).argmax(1) == y).float().mean()):.3f}" for group, (x, y) in tests.items()]
        print(f"accuracy {name:44}", *right)


if __name__ == "__main__":
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 6)
