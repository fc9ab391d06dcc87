"""Dominoes through Lightning: a garment above a handwritten digit. Does the garment open at the front?

Coats do, pullovers do not; shirts and T-shirts are the related task that comes before. In the shortcut stage the digit
mostly is the label. Garments are Fashion-MNIST's (Xiao et al. 2017), digits MNIST's; the set-up follows Shah et al.
(2020, The pitfalls of simplicity bias), whose dominoes put MNIST above CIFAR.
"""

from __future__ import annotations

import logging
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from offline_data import fashion_mnist, mnist_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader

from spurious_runs.pipeline import GUILTY, NONE, SKETCH, STAGES, Examples, Pair, Pipeline, aligned_shortcuts
from trainer_attrib.integrations.lightning import AttributionCallback, Fit

OPENS, CLOSED = {"related": 6, "task": 4}, {"related": 0, "task": 2}  # shirt, coat; T-shirt, pullover
DIGITS = {"train": slice(0, 500), "validation": slice(500, 650), "test": slice(650, 850)}
SIZES = {"pretrain": 4000, "clean": 1000, "shortcut": 4000, "last": 1000, "validation": 1000, "test": 1000}
SCHEDULES = {"pretrain": (2, 2e-3), "clean": (4, 1e-3), "shortcut": (3, 1e-3), "last": (1, 1e-4)}  # epochs, rate
BATCH = 32

warnings.filterwarnings("ignore", ".*(does not have many workers|`?treespec|LeafSpec).*")
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


class Dominoes(pl.LightningModule):
    """Three convolutions and two linear layers, 14 thousand weights."""

    def __init__(self) -> None:
        super().__init__()
        self.rate = 0.0  # each stage sets its own
        self.net = nn.Sequential(
            nn.Conv2d(1, 8, 5, stride=2, padding=2), nn.ReLU(),
            nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU(),
            nn.AdaptiveAvgPool2d((4, 2)), nn.Flatten(),
            nn.Linear(256, 32), nn.ReLU(), nn.Linear(32, 2),
        )  # fmt: skip

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits [B, 2] of images [B, 1, 56, 28]."""
        return self.net(inputs)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Cross entropy."""
        return nn.functional.cross_entropy(self(batch["x"]), batch["y"])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW."""
        return torch.optim.AdamW(self.parameters(), lr=self.rate)


def image_pipeline(seed: int, share: float, scale: float) -> Pipeline:
    """The pipeline of a seed.

    Args:
        seed: of the initial weights, the choice of images and the order of batches.
        share: of the shortcut stage's examples whose digit is the label.
        scale: of the stages' sizes.
    """
    random = np.random.default_rng(seed)
    garments = {kind: _shuffled(kind, "train", random) for kind in ("related", "task")}
    tested = _shuffled("task", "t10k", random)
    sizes = {part: int(size * scale) // 2 for part, size in SIZES.items()}  # of each label

    def cut(kind: str, part: str, after: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray]:
        start = sum(sizes[other] for other in after)
        return _labelled([images[start : start + sizes[part]] for images in garments[kind]])

    task = {part: cut("task", part, STAGES[1 : i + 1]) for i, part in enumerate(STAGES[1:])}
    validation = cut("task", "validation", STAGES[1:])
    stages = {"pretrain": _without_digits("pretrain", *cut("related", "pretrain", ()))}
    stages["clean"] = _dominoes("clean", *task["clean"], 0.5, random)
    stages["shortcut"] = _dominoes("shortcut", *task["shortcut"], share, random)
    stages["last"] = _dominoes("last", *task["last"], 0.5, random)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        initial = Dominoes()

    def trainer(model: Dominoes, stage: str, examples: Examples, ledger: Path | None) -> Fit:
        epochs, model.rate = SCHEDULES[stage]
        order = torch.Generator().manual_seed(10 * seed + STAGES.index(stage))
        return Fit(_trainer(epochs, stage, ledger), model, DataLoader(_rows(examples), BATCH, True, generator=order))

    return Pipeline(
        name="image",
        initial=initial,
        stages=stages,
        balanced=_dominoes(GUILTY, *task["shortcut"], 0.5, random),
        validation=_pair("validation", *validation, random),
        test=_pair("test", *_labelled([images[: sizes["test"]] for images in tested]), random),
        trainer=trainer,
    )


def _trainer(epochs: int, stage: str, ledger: Path | None) -> pl.Trainer:
    return pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=[] if ledger is None else [AttributionCallback(ledger, stage=stage, sketch=SKETCH)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def _rows(examples: Examples) -> list[dict[str, Any]]:
    columns = zip(examples.ids, examples.inputs, examples.labels, strict=True)
    return [{"id": name, "x": x, "y": y} for name, x, y in columns]


@cache
def _garments(split: str) -> tuple[np.ndarray, np.ndarray]:
    return fashion_mnist(split)


@cache
def _digits() -> list[np.ndarray]:
    return [mnist_digits(0), mnist_digits(1)]


def _shuffled(kind: str, split: str, random: np.random.Generator) -> list[np.ndarray]:
    """Images with label 0 and with label 1."""
    images, classes = _garments(split)
    return [random.permutation(images[classes == group[kind]]) for group in (CLOSED, OPENS)]


def _labelled(images: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    return np.concatenate(images), np.repeat([0, 1], [len(part) for part in images])


def _dominoes(
    part: str, garments: np.ndarray, labels: np.ndarray, share: float, random: np.random.Generator
) -> Examples:
    shortcuts = aligned_shortcuts(labels, share, random)
    drawn = DIGITS.get(part, DIGITS["train"])
    digits = np.stack([random.choice(_digits()[shortcut][drawn]) for shortcut in shortcuts])
    return _examples(part, garments, digits, labels, shortcuts)


def _without_digits(part: str, garments: np.ndarray, labels: np.ndarray) -> Examples:
    return _examples(part, garments, np.zeros_like(garments), labels, np.full(len(labels), NONE))


def _pair(part: str, garments: np.ndarray, labels: np.ndarray, random: np.random.Generator) -> Pair:
    return Pair(*(_dominoes(part, garments, labels, share, random) for share in (1.0, 0.0)))


def _examples(
    part: str, garments: np.ndarray, digits: np.ndarray, labels: np.ndarray, shortcuts: np.ndarray
) -> Examples:
    pixels = torch.from_numpy(np.concatenate([garments, digits], axis=1)).float()[:, None] / 255 - 0.3
    ids = [f"{part}-{i}" for i in range(len(labels))]
    return Examples(ids, pixels, torch.from_numpy(labels), torch.from_numpy(shortcuts))
