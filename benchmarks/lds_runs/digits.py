"""A perceptron 64-64-10 on 1000 of scikit-learn's digits, asked about 100 others: seconds to train a thousand times.

Batches of 50 for 30 epochs, a constant learning rate, float32. The behavior of a query is the margin of its class, the
logit minus the logarithm of the sum of the others' exponentials (Park et al. 2023, section 3.1). 4810 parameters.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import torch
from stage_runs.digits import images
from torch import Tensor, nn

from lds_runs.digits_model import CONFIGS, TRAIN, losses, margins, orders, train
from lds_runs.testbed import RANK, SNAPSHOTS, STAGE, Trained, restore
from trainer_attrib import Behavior, Ledger, Recorder, SketchConfig

TEST = 100


@cache
def data() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Pixels from 0 to 1 [N, 64] and labels [N] to train on, and to ask about."""
    pixels, labels = images()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    parts = order[:TRAIN], order[TRAIN : TRAIN + TEST]
    known, asked = ((pixels[rows].flatten(1), labels[rows]) for rows in parts)
    return known, asked


def behavior() -> Behavior:
    """The margin of each query."""
    pixels, labels = data()[1]
    queries = [f"#{i}: class {int(label)}" for i, label in enumerate(labels)]
    items = list(zip(pixels, labels, strict=True))
    return Behavior("margin", items, _measure, queries, batch_size=TEST, unit="logits")


def trained(config: str, seed: int, cache: Path, dtype: str = "float16") -> Trained:
    """The recorded training, run unless the folder holds it."""
    setup, (known, asked) = CONFIGS[config], data()
    ledger, ids = cache / f"digits-{config}-{seed}", [f"digit-{i:04d}" for i in range(TRAIN)]
    model = setup.model(seed)
    if not (ledger / "done").exists():
        optimizer = setup.optimizer(model.parameters())
        with Recorder(
            ledger, stage=STAGE, model=model, optimizer=optimizer, sketch=SketchConfig(rank=RANK, dtype=dtype),
            snapshots=SNAPSHOTS, total_steps=len(orders(seed)), strict=True,
        ) as recorder:  # fmt: skip
            train(model, optimizer, known, seed, lambda rows: recorder.batch(ids=[ids[i] for i in rows]))
        (ledger / "done").touch()
    weights = Ledger(ledger).stage(STAGE).snapshot("end")
    return Trained(config, seed, restore(model, weights), ledger, ids, known, asked, losses, behavior())


def train_plainly(config: str, seed: int) -> nn.Module:
    """The same training without a recording: what costs are measured against."""
    model = CONFIGS[config].model(seed)
    train(model, CONFIGS[config].optimizer(model.parameters()), data()[0], seed, lambda rows: nullcontext())
    return model


def _measure(model: nn.Module, items: list[Any]) -> Tensor:
    pixels, labels = (torch.stack(column) for column in zip(*items, strict=True))
    return margins(model(pixels), labels)
