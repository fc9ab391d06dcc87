"""Trainings whose examples can be given other weights: recorded once, and trained again by a loop of their own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from tests.analysis.looped import network
from tests.analysis.stages import margins
from trainer_attrib import Analyzer, Behavior, Influence, Recorder, SketchConfig
from trainer_attrib.analysis.loops import Loop

EXAMPLES, EPOCHS = 10, 3
Weights = dict[str, Tensor]
"""Stage -> weight of each of its examples' losses."""


def adamw(model: Any) -> Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.02, weight_decay=0.1)


def plain(model: Any, batch: Any) -> Tensor:
    """The mean loss of a batch of inputs, labels and numbers of examples, as a program has it."""
    return F.cross_entropy(model(batch[0]), batch[1])


def falling(optimizer: Optimizer) -> Any:
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + 0.2 * step))


@dataclass
class Weighted:
    """Stages of a small float64 classifier; batches of four of ten examples, so that the last one is short.

    Args:
        optimizer: of every stage.
        stages: names.
        carried: the first optimizer goes on through all stages.
        accumulate: micro-batches of a step.
        max_norm: to which gradients are clipped.
        make_schedule: of the learning rate.
        frozen: prefix of the weights that the stages after the first do not train.
        drop_last: without the short batch.
        make_model: new initial weights, always the same.
        recording: arguments of the recorder.
    """

    optimizer: Callable[[Any], Optimizer] = adamw
    stages: Sequence[str] = ("only",)
    carried: bool = False
    accumulate: int = 1
    max_norm: float | None = None
    make_schedule: Callable[[Optimizer], Any] | None = None
    frozen: str = "none"
    drop_last: bool = False
    make_model: Callable[[], Any] = lambda: network(0.0, norm=False)
    recording: dict[str, Any] = field(default_factory=dict)

    def batches(self, stage: str) -> list[Any]:
        """Inputs, labels and numbers of the examples."""
        generator = torch.Generator().manual_seed(self.stages.index(stage))
        x = torch.randn(EXAMPLES, 6, generator=generator).double()
        y = torch.randint(0, 3, (EXAMPLES,), generator=generator)
        parts = torch.randperm(EXAMPLES, generator=generator).split(4)
        return [(x[rows], y[rows], rows) for rows in (parts[:-1] if self.drop_last else parts)]

    def loop(self, stage: str, model: Any) -> Loop:
        """The stage as a program's answer."""
        torch.manual_seed(5)  # of dropout
        batches = self.batches(stage)
        steps = EPOCHS * -(-len(batches) // self.accumulate)
        return Loop(model, plain, batches, self.optimizer, steps, self.accumulate, self.max_norm)

    @property
    def programs(self) -> dict[str, Any]:
        """Every stage, to be run again."""
        return {stage: lambda model, stage=stage: self.loop(stage, model) for stage in self.stages}

    def train(self, weights: Weights | None = None, ledger: Path | None = None) -> nn.Module:
        """A training from the beginning, recorded if there is a ledger."""
        model, optimizer = self.make_model(), None
        for stage in self.stages:
            frozen = self.frozen if stage != self.stages[0] else "none"
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(not name.startswith(frozen))
            optimizer = optimizer if optimizer is not None and self.carried else self.optimizer(model)
            asked = {"sketch": SketchConfig(rank=2), "strict": True, **self.recording}
            if ledger is None:
                self._train(model, stage, optimizer, (weights or {}).get(stage))
            else:
                with Recorder(ledger, stage=stage, model=model, optimizer=optimizer, **asked) as recorder:
                    self._train(model, stage, optimizer, None, recorder)
        return model

    def analyzer(self, ledger: Path) -> Analyzer:
        """Of a recorded training."""
        return Analyzer(ledger, self.train(ledger=ledger))

    def differences(self, behavior: Behavior, stage: str, size: float = 1e-4) -> np.ndarray:
        """Central differences of retraining with each example's weight in turn a little more and less, [Q, N]."""
        columns = []
        for example in range(EXAMPLES):
            change = torch.zeros(EXAMPLES).double()
            change[example] = size
            more, less = (behavior.values(self.train({stage: 1 + sign * change})) for sign in (1, -1))
            columns.append((more - less).numpy() / (2 * size))
        return np.stack(columns, axis=1)

    def _train(
        self, model: Any, stage: str, optimizer: Optimizer, weights: Tensor | None, recorder: Any = None
    ) -> None:
        schedule = self.make_schedule(optimizer) if self.make_schedule else None
        torch.manual_seed(5)
        model.train()
        batches = self.batches(stage)
        for first in [*range(0, len(batches), self.accumulate)] * EPOCHS:
            window = batches[first : first + self.accumulate]
            optimizer.zero_grad()
            for x, y, rows in window:
                names = [f"{stage}/{int(row)}" for row in rows]
                with (
                    nullcontext()
                    if recorder is None
                    else recorder.batch(names, texts=names, sources=["data"] * len(names))
                ):
                    losses = F.cross_entropy(model(x), y, reduction="none")
                    weighted = losses if weights is None else losses * weights[rows]
                    (weighted.mean() / len(window)).backward()
            if self.max_norm is not None:
                nn.utils.clip_grad_norm_(model.parameters(), self.max_norm)
            optimizer.step()
            if schedule is not None:
                schedule.step()


def asked() -> Behavior:
    """Margins of three inputs."""
    return margins(count=3)


def in_order(found: Influence, stage: str) -> np.ndarray:
    """Scores of a stage's examples by their number; 0 for one that no step had."""
    columns = {name: column for column, name in enumerate(found.examples.ids)}
    names = [f"{stage}/{number}" for number in range(EXAMPLES)]
    none = np.zeros(len(found.scores))
    return np.stack([found.scores[:, columns[n]] if n in columns else none for n in names], axis=1)
