"""A three-stage run of a small float64 classifier in a plain loop, with the programs that repeat it."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from trainer_attrib import Behavior, Recorder, SketchConfig
from trainer_attrib.analysis.loops import Loop

STAGES = ("first", "second", "third")


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.body(x)))


@dataclass
class Run:
    """The trained model, where it was recorded, and everything needed to train it again: whole, or step by step."""

    model: nn.Module
    initial: dict[str, torch.Tensor]
    ledger: object
    programs: dict
    data: dict
    loops: dict


def stage_data(stage: str):
    generator = torch.Generator().manual_seed(STAGES.index(stage))
    return torch.randn(24, 6, generator=generator).double(), torch.randint(0, 3, (24,), generator=generator)


def make_optimizer(kind: str, model: nn.Module, lr: float):
    if kind == "adamw":
        return torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.1)
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9 if kind == "momentum" else 0.0, weight_decay=0.1)


def train(model, stage, kind="adamw", lr=0.02, recorder_for=None, loss=F.cross_entropy):
    """Four epochs of batches of 6; the recorder, if any, is opened around the loop."""
    x, y = stage_data(stage)
    optimizer = make_optimizer(kind, model, lr)

    def loop(recorder=None):
        model.train()
        for step in range(16):
            rows = torch.arange(6) + 6 * (step % 4)
            optimizer.zero_grad()
            if recorder is None:
                loss(model(x[rows]), y[rows]).backward()
            else:
                names = [f"{stage}/{int(i)}" for i in rows]
                with recorder.batch(names, texts=[f"row {int(i)}" for i in rows], denominator=6):
                    loss(model(x[rows]), y[rows]).backward()
            optimizer.step()

    if recorder_for is None:
        loop()
    else:
        with recorder_for(stage, model, optimizer) as recorder:
            loop(recorder)


def loop_of(model, stage, kind="adamw", lr=0.02, loss=F.cross_entropy):
    """The same training as :func:`train`, to be driven step by step."""
    x, y = stage_data(stage)
    batches = [(x[i : i + 6], y[i : i + 6]) for i in range(0, 24, 6)]
    return Loop(model, lambda m, batch: loss(m(batch[0]), batch[1]), batches, lambda m: make_optimizer(kind, m, lr), 16)


def three_stages(ledger, kind="adamw", lr=0.02, sketch=None, loss=F.cross_entropy, stages=STAGES) -> Run:
    torch.manual_seed(0)
    model = Classifier().double()
    initial = copy.deepcopy(model.state_dict())
    sketch = sketch or SketchConfig(rank=16, dtype="float32")

    def recorder_for(stage, model, optimizer):
        return Recorder(
            ledger, stage=stage, model=model, optimizer=optimizer, sketch=sketch, strict=True, total_steps=16
        )

    for stage in stages:
        train(model, stage, kind, lr, recorder_for, loss)
    programs = {s: lambda m, s=s: lambda: train(m, s, kind, lr, loss=loss) for s in stages}
    loops = {s: lambda m, s=s: loop_of(m, s, kind, lr, loss) for s in stages}
    return Run(model, initial, ledger, programs, {s: stage_data(s) for s in stages}, loops)


def margins(name="margin", seed=9, count=7) -> Behavior:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, 6, generator=generator).double()
    return Behavior.margin(name, inputs, torch.randint(0, 3, (count,), generator=generator))


def record_loops(ledger, model, loops) -> None:
    """Train a model by loops in turn, each recorded as the stage of its name; they are programs too."""
    for stage, loop_of in loops.items():
        loop = loop_of(model)
        optimizer = loop.optimizer()
        settings = {"sketch": SketchConfig(rank=4, dtype="float32"), "total_steps": loop.total_steps}
        with Recorder(ledger, stage=stage, model=model, optimizer=optimizer, **settings) as recorder:
            for step, _ in zip(loop.steps(), range(loop.total_steps), strict=False):
                optimizer.zero_grad()
                for loss in step.losses:
                    with recorder.batch():
                        loss().backward()
                loop.clip()
                optimizer.step()
