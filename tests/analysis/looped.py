"""Stages trained by loops that the analyzer can drive step by step, recorded on the way, with every kind of state:
dropout, running norms, schedules, clipping, accumulation, frozen weights, carried optimizers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, TensorDataset

from trainer_attrib import Analyzer, Recorder, SketchConfig
from trainer_attrib.analysis.loops import Loop
from trainer_attrib.analysis.programs import Program

OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.05, weight_decay=0.01),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9, weight_decay=0.01, foreach=True),
    "Nesterov": lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9, nesterov=True),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.01),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "AdamW, fused": lambda p: torch.optim.AdamW(p, lr=0.01, betas=(0.8, 0.95), fused=True),
    "AMSGrad": lambda p: torch.optim.AdamW(p, lr=0.01, amsgrad=True),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.005, momentum=0.5),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.02),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=0.01),
    "RAdam": lambda p: torch.optim.RAdam(p, lr=0.01),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=0.01),
}


def network(dropout: float = 0.2, norm: bool = True) -> nn.Sequential:
    """A float64 classifier of six numbers into three classes."""
    torch.manual_seed(3)
    middle = [nn.BatchNorm1d(8)] if norm else []
    return nn.Sequential(nn.Linear(6, 8), *middle, nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 3)).double()


@dataclass
class Looped:
    """Stages of one kind; :meth:`record` trains them, :attr:`programs` train them again.

    Args:
        optimizer: name in ``OPTIMIZERS``.
        steps: of each stage, by name.
        scales: what the learning rate is multiplied by in each stage, 1 by default.
        carried: stages that go on with the optimizer of the stage before.
        frozen: stage -> prefix of the weights that it does not train.
        settings: of every Loop.
        shadows: stage -> what its recorder is asked for.
    """

    optimizer: str = "AdamW"
    steps: dict[str, int] = field(default_factory=lambda: {"first": 12, "second": 13, "third": 9})
    scales: dict[str, float] = field(default_factory=dict)
    carried: Sequence[str] = ()
    frozen: dict[str, str] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    shadows: dict[str, Any] = field(default_factory=dict)

    def loop(self, stage: str, model: Any) -> Loop:
        """The stage as a program's answer."""
        number = list(self.steps).index(stage)
        torch.manual_seed(number)  # of dropout
        generator = torch.Generator().manual_seed(number)
        x = torch.randn(40, 6, generator=generator).double() + 0.3 * number
        y = (x[:, :3] + 0.5 * torch.randn(40, 3, generator=generator)).argmax(1)
        order = torch.Generator().manual_seed(100 + number)
        batches = DataLoader(TensorDataset(x, y), batch_size=8, shuffle=True, generator=order)
        scale = self.scales.get(stage, 1.0)

        def make_optimizer(model: Any) -> Optimizer:
            made = OPTIMIZERS[self.optimizer]([p for p in model.parameters() if p.requires_grad])
            for group in made.param_groups:
                group["lr"] *= scale
            return made

        def loss(model: Any, batch: Any) -> Tensor:
            return F.cross_entropy(model(batch[0]), batch[1])

        return Loop(model, loss, batches, make_optimizer, self.steps[stage], **self.settings)

    @property
    def programs(self) -> dict[str, Program]:
        """Every stage, to be run again."""
        return {stage: lambda model, stage=stage: self.loop(stage, model) for stage in self.steps}

    def without(self, stage: str) -> Looped:
        """The same training without one stage."""
        return replace(self, steps={**self.steps, stage: 0})

    def train(self, model: Any, ledger: Path | None = None) -> Any:
        """Train all stages; with a ledger, record them. Returns the model."""
        optimizer: Optimizer | None = None
        for stage, count in self.steps.items():
            if count:
                optimizer = self._stage(model, stage, optimizer if stage in self.carried else None, ledger)
        return model

    def analyzer(self, ledger: Path, model: Any) -> Analyzer:
        """Of the model just trained."""
        return Analyzer(ledger, self.train(model, ledger))

    def _stage(self, model: Any, stage: str, optimizer: Optimizer | None, ledger: Path | None) -> Optimizer:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not name.startswith(self.frozen.get(stage, "none")))
        model.train()
        loop = self.loop(stage, model)
        if optimizer is None:
            optimizer = loop.optimizer()
        for group, new in zip(optimizer.param_groups, loop.optimizer().param_groups, strict=True):
            group["lr"] = group["initial_lr"] = new["lr"]
        loop = replace(loop, make_optimizer=lambda model: optimizer)
        if ledger is None:
            loop.train()
        else:
            self._recorded(loop, stage, optimizer, ledger)
        return optimizer

    def _recorded(self, loop: Loop, stage: str, optimizer: Optimizer, ledger: Path) -> None:
        model, asked = loop.model, self.shadows.get(stage, ())
        recorder = Recorder(
            ledger, stage=stage, model=model, optimizer=optimizer, sketch=SketchConfig(rank=2, dtype="float32"),
            strict=True, shadow=asked,
        )  # fmt: skip

        def loss(part: Any) -> Tensor:
            return F.cross_entropy(model(part[0]), part[1])

        def recorded(_model: Any, batch: Any) -> Tensor:
            """The backward pass inside the recorder's block; the loop's own then adds nothing."""
            with recorder.batch(loss=loss, of=batch):
                value = loss(batch)
                value.backward()
            return 0 * value.detach().requires_grad_()

        with recorder:
            replace(loop, loss=recorded if asked else loop.loss).train()


def weights_of(model: Any) -> dict[str, Tensor]:
    """Copies."""
    return copy.deepcopy({name: p.detach() for name, p in model.named_parameters()})
