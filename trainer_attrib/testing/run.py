"""One training run, as every integration of the contract suite is asked to train it, and the model that it trains."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader

from trainer_attrib.types import SketchConfig

TOKENS, LENGTH, CLASSES = 13, 5, 3
Example = dict[str, Any]


class Classifier(nn.Module):
    """Classifies rows of tokens: ``model(input_ids=..., labels=...)`` returns the batch's mean loss and its logits.

    Args:
        dropout: share of hidden numbers set to 0.
        breaks_at: the training forward pass, counted from 1, that raises ``error``.
        overflows_at: the training forward pass, counted from 1, whose loss is infinite, and so are its gradients.
    """

    def __init__(
        self,
        dropout: float = 0.0,
        breaks_at: int = 0,
        error: type[BaseException] = RuntimeError,
        overflows_at: int = 0,
    ) -> None:
        super().__init__()
        self.overflows_at = overflows_at
        self.embedding, self.dropout = nn.Embedding(TOKENS, 6), nn.Dropout(dropout)
        self.body, self.head = nn.Linear(6, 8), nn.Linear(8, CLASSES)
        self.breaks_at, self.error, self.passes = breaks_at, error, 0

    def logits(self, input_ids: Tensor) -> Tensor:
        """[B, CLASSES]."""
        return self.head(self.dropout(self.body(self.embedding(input_ids)).tanh().mean(1)))

    def example_losses(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        """Each example's own loss, [B]."""
        return F.cross_entropy(self.logits(input_ids), labels, reduction="none")

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """``loss``: the mean over the batch; ``logits``: [B, CLASSES]."""
        self.passes += self.training
        if self.training and self.passes == self.breaks_at:
            raise self.error("stopped")
        logits = self.logits(input_ids)
        loss = F.cross_entropy(logits, labels)
        overflows = self.training and self.passes == self.overflows_at
        return {"loss": loss * torch.inf if overflows else loss, "logits": logits}


def make_examples(count: int = 10) -> list[Example]:
    """Examples with an ``id``, ``input_ids`` [LENGTH] and ``labels``, all different; with a batch size of 4 the last
    batch is a smaller one."""
    tokens = torch.randint(TOKENS, (count, LENGTH), generator=torch.Generator().manual_seed(11))
    return [{"id": f"example-{i}", "input_ids": row.tolist(), "labels": i % CLASSES} for i, row in enumerate(tokens)]


def collate(items: list[Example]) -> dict[str, Any]:
    """``input_ids`` [B, LENGTH] and ``labels`` [B]; ``id``, a list of names, if the items have them."""
    batch: dict[str, Any] = {key: torch.tensor([item[key] for item in items]) for key in ("input_ids", "labels")}
    return batch | ({"id": [item["id"] for item in items]} if "id" in items[0] else {})


def constant(step: int) -> float:
    """A schedule that stays at the full rate."""
    return 1.0


@dataclass(frozen=True)
class Run:
    """What to train, how, and what to record. An integration turns this into its framework's own settings.

    Args:
        folder: for whatever the framework writes.
        ledger: where to record the stage ``"one"``; None trains without the recorder.
        sketch: of the recorder.
        strict: of the recorder.
        examples: rows with an ``id``.
        batch_size: examples per micro-batch.
        epochs: passes over the examples; None if ``max_steps`` ends training.
        max_steps: optimizer steps after which training ends, wherever in an epoch.
        accumulate: micro-batches per optimizer step; the mean of their losses is minimized.
        clip: largest norm of the gradient; None for no clipping.
        optimizer: parameters -> optimizer.
        schedule: step (from 0) -> factor of the learning rate, to be stepped with the optimizer.
        shuffle: whether the framework draws an order of its own in every epoch.
        workers: loader processes.
        dropout: of the model.
        dtype: of the model's weights.
        breaks_at: micro-batch, counted from 1, in whose forward pass the model raises ``error``; 0 for none.
        error: what it raises.
        save_every: optimizer steps between checkpoints in ``folder``; 0 for no checkpoints.
        resume: go on from the last checkpoint in ``folder``, into the same stage.
        overflow_at: micro-batch, counted from 1, whose loss the model makes infinite: train under a gradient scaler,
            which skips its step, in full precision otherwise; 0 trains without a scaler.
    """

    folder: Path
    ledger: Path | None = None
    sketch: SketchConfig = field(default_factory=lambda: SketchConfig(rank=4, dtype="float32", correction="none"))
    strict: bool = True
    examples: Sequence[Example] = field(default_factory=make_examples)
    batch_size: int = 4
    epochs: int | None = 2
    max_steps: int | None = None
    accumulate: int = 1
    clip: float | None = None
    optimizer: Callable[[list[nn.Parameter]], Optimizer] = lambda p: AdamW(p, lr=1e-2, betas=(0.8, 0.95))
    schedule: Callable[[int], float] = constant
    shuffle: bool = False
    workers: int = 0
    dropout: float = 0.0
    dtype: torch.dtype = torch.float32
    breaks_at: int = 0
    error: type[BaseException] = RuntimeError
    save_every: int = 0
    resume: bool = False
    overflow_at: int = 0
    seed: int = 3
    made: list[Classifier] = field(default_factory=list, init=False, compare=False)

    def model(self) -> Classifier:
        """A new model, the same each time."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            model = Classifier(self.dropout, self.breaks_at, self.error, self.overflow_at).to(self.dtype)
        self.made.append(model)
        return model.train()

    def tuning(self, parameters: Iterable[nn.Parameter]) -> tuple[Optimizer, LambdaLR]:
        """The optimizer and its schedule."""
        optimizer = self.optimizer(list(parameters))
        return optimizer, LambdaLR(optimizer, self.schedule)

    def loader(self) -> DataLoader[Any]:
        """For frameworks that are handed one. Batches are :func:`collate`'s; ``id`` is no input of the model."""
        rows: Any = list(self.examples)
        return DataLoader(rows, self.batch_size, shuffle=self.shuffle, num_workers=self.workers, collate_fn=collate)


@dataclass(frozen=True)
class Trained:
    """What a run left behind.

    Args:
        model: as the framework holds it, perhaps inside a module of its own.
        losses: as the framework reports them, by step or by micro-batch: recording must not change them.
    """

    model: nn.Module
    losses: list[float]
