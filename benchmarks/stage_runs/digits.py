"""A small classifier of handwritten digits in four stages, trained by Lightning.

    0 noisy     all digits, 15 % of the labels wrong
    1 shortcut  half of the images have a patch in a corner and are labelled "7"
    2 rotated   digits 0 to 4 only, turned by 90 degrees
    3 clean     300 clean images

8 x 8 images of the UCI set "Optical Recognition of Handwritten Digits" (Alpaydin & Kaynak 1998, CC BY 4.0) as they are
in scikit-learn's wheel; 1397 to train on, 400 to ask about. The model is 64-32-10 with GELU, 2410 parameters.
"""

from __future__ import annotations

import gzip
import io
import logging
import sys
import warnings
import zipfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from offline_data import Package
from offline_data import cache as folder
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from stage_runs.regimes import Regime, order_seed, recording
from trainer_attrib import Behavior
from trainer_attrib.analysis.programs import Program
from trainer_attrib.integrations.lightning import AttributionCallback, Fit

STAGES = ("noisy", "shortcut", "rotated", "clean")
BATCH, TRAINED_ON, CLASSES, PATCH_LABEL = 32, 1397, 10, 7
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "SGD": lambda parameters, lr: torch.optim.SGD(parameters, lr, momentum=0.9, weight_decay=1e-3),
    "AdamW": lambda parameters, lr: torch.optim.AdamW(parameters, lr, betas=(0.9, 0.99), weight_decay=0.01),
}
WHEEL = Package(
    "scikit_learn-1.7.2-cp311-cp311-manylinux2014_x86_64.manylinux_2_17_x86_64.whl",
    "89877e19a80c7b11a2891a27c21c4894fb18e2c2e077815bcade10d34287b20d",
    (sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--python-version=3.11",
     "--implementation=cp", "--abi=cp311", "--platform=manylinux2014_x86_64", "scikit-learn==1.7.2"),
)  # fmt: skip


@cache
def images() -> tuple[Tensor, Tensor]:
    """Pixels from 0 to 1, [1797, 8, 8], and labels [1797]."""
    packed = zipfile.ZipFile(WHEEL.path()).read("sklearn/datasets/data/digits.csv.gz")
    values = np.loadtxt(io.BytesIO(gzip.decompress(packed)), delimiter=",")
    return torch.tensor(values[:, :-1] / 16, dtype=torch.float32).reshape(-1, 8, 8), torch.tensor(values[:, -1]).long()


def patched(pixels: Tensor) -> Tensor:
    """A bright square of 2 x 2 in a corner."""
    changed = pixels.clone()
    changed[:, :2, :2] = 1.0
    return changed


def rotated(pixels: Tensor) -> Tensor:
    """Turned by 90 degrees."""
    return torch.rot90(pixels, 1, (1, 2))


class Classifier(pl.LightningModule):
    """``optimizing`` makes its optimizer; each stage sets another."""

    optimizing: Callable[[Any], torch.optim.Optimizer]

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 32), nn.GELU(), nn.Linear(32, CLASSES))

    def forward(self, pixels: Tensor) -> Tensor:
        """Logits [B, 10] of images [B, 8, 8]."""
        return self.net(pixels.flatten(1))

    def training_step(self, batch: list[Tensor]) -> Tensor:
        """Mean cross entropy."""
        return cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The stage's."""
        return self.optimizing(self.parameters())


class Digits:
    """The pipeline at one regime and seed; the seed decides initial weights, split, label noise and orders."""

    stages = STAGES

    def __init__(self, regime: Regime, seed: int) -> None:
        self.regime, self.seed = regime, seed
        pixels, labels = images()
        shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
        train, held_out = shuffled[:TRAINED_ON], shuffled[TRAINED_ON:]
        self._train, self._held_out = (pixels[train], labels[train]), (pixels[held_out], labels[held_out])
        self._data = self._stage_data()

    def model(self) -> nn.Module:
        """New weights."""
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            return Classifier()

    def programs(self, ledger: Path | None = None, order: int = 0) -> dict[str, Program]:
        """A :class:`Fit` of each stage."""
        return {name: self._program(number, ledger, order) for number, name in enumerate(STAGES)}

    def behaviors(self) -> list[Behavior]:
        """Mean loss and mean margin of each class, on held-out images as they are, with the patch, and turned."""
        pixels, labels = self._held_out
        views = {"clean": pixels, "patched": patched(pixels), "rotated": rotated(pixels)}
        groups = {
            f"{view} {digit}": (shown[labels == digit], labels[labels == digit])
            for view, shown in views.items()
            for digit in range(CLASSES)
        }
        items, names = list(groups.values()), list(groups)
        return [
            Behavior("loss", items, _losses, names, unit="nats"),
            Behavior("margin", items, _margins, names, unit="logits"),
        ]

    def _stage_data(self) -> list[TensorDataset]:
        generator = torch.Generator().manual_seed(10_000 + self.seed)
        pixels, labels = self._train
        wrong = torch.rand(len(labels), generator=generator) < 0.15
        noise = torch.randint(1, CLASSES, labels.shape, generator=generator)
        noisy = torch.where(wrong, (labels + noise) % CLASSES, labels)
        cue = torch.rand(len(labels), generator=generator) < 0.5
        few = labels < 5
        return [
            TensorDataset(pixels, noisy),
            TensorDataset(
                torch.where(cue[:, None, None], patched(pixels), pixels), torch.where(cue, PATCH_LABEL, labels)
            ),
            TensorDataset(rotated(pixels)[few], labels[few]),
            TensorDataset(pixels[:300], labels[:300]),
        ]

    def _program(self, number: int, ledger: Path | None, order: int) -> Program:
        name, rate = STAGES[number], self.regime.rates[number]
        make = OPTIMIZERS[self.regime.optimizer]

        def program(model: Any) -> Fit:
            model.optimizing = lambda parameters: make(parameters, lr=rate)
            generator = torch.Generator().manual_seed(order_seed(self.seed, number, order))
            loader = DataLoader(self._data[number], BATCH, shuffle=True, drop_last=True, generator=generator)
            callbacks = [] if ledger is None else recording(AttributionCallback, ledger, name, STAGES[:number])
            return Fit(_trainer(self.regime.steps[number], callbacks), model, loader)

        return program


def quiet() -> None:
    """Lightning says much at every fit."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")


def _trainer(steps: int, callbacks: list[Any]) -> pl.Trainer:
    return pl.Trainer(
        max_steps=steps, max_epochs=-1, callbacks=callbacks, accelerator="cpu", logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=str(folder()),
    )  # fmt: skip


def _losses(model: nn.Module, items: list[Any]) -> Tensor:
    return torch.stack([cross_entropy(model(pixels), labels) for pixels, labels in items])


def _margins(model: nn.Module, items: list[Any]) -> Tensor:
    return torch.stack([margins(model(pixels), labels).mean() for pixels, labels in items])


def margins(logits: Tensor, labels: Tensor) -> Tensor:
    """Logit of the label minus the largest other one, [N] of [N, C] and [N]."""
    own = logits.gather(1, labels[:, None]).squeeze(1)
    return own - logits.scatter(1, labels[:, None], float("-inf")).max(1).values
