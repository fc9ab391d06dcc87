"""bergson: sketches of 16 by 16, inner products and its TrackStar's curvature; causal language models only.

Its command line loads models from the hub's format; here its collector is given the model itself. Its EK-FAC is only
reached by way of saved models and data sets, and is not run.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from bergson import CollectorComputer, GradientProcessor, InMemoryCollector
from bergson.config import IndexConfig
from bergson.hessians.preconditioner import DensePreconditioner
from datasets import Dataset
from torch import Tensor, nn

from lds_runs.adapters.task import CHARGPT, Method, Task

PACKAGE = "bergson"
BATCH = 32


class _Causal(nn.Module):
    """Looks like a transformers model."""

    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, **_: Any) -> SimpleNamespace:
        return SimpleNamespace(logits=self.model(input_ids))


def _gradients(task: Task, windows: Tensor, folder: Path, hessians: bool) -> tuple[dict[str, Tensor], Any]:
    config = IndexConfig(run_path=str(folder / "run"), projection_dim=16, loss_reduction="mean")
    config.partial_run_path.mkdir(parents=True, exist_ok=True)
    data, processor = Dataset.from_dict({"input_ids": windows.tolist()}), GradientProcessor(projection_dim=16)
    model = _Causal(task.model())
    collector = InMemoryCollector(model=model, data=data, cfg=config, processor=processor, skip_hessians=not hessians)
    batches = [list(range(len(windows))[at : at + BATCH]) for at in range(0, len(windows), BATCH)]
    computer = CollectorComputer(model, data, collector=collector, batches=batches, cfg=config)
    computer.run_with_collector_hooks()
    return collector.gradients, processor


def _scores(task: Task, curvature: bool, unit: bool) -> Tensor:
    with tempfile.TemporaryDirectory() as folder:
        train, processor = _gradients(task, task.train[0], Path(folder, "train"), curvature)
        test, _ = _gradients(task, task.test[0], Path(folder, "test"), False)
    if curvature:
        power = -0.5 if unit else -1.0
        inverse = DensePreconditioner.from_processor(processor, power=power)
        test, train = inverse.apply(test), inverse.apply(train) if unit else train
    known, asked = (torch.cat([part[name].float() for name in train], 1) for part in (train, test))
    if unit:
        known, asked = nn.functional.normalize(known, dim=1), nn.functional.normalize(asked, dim=1)
    return asked @ known.T


METHODS = [
    Method("bergson GradDot, 16 x 16", lambda task: _scores(task, False, False), True, (CHARGPT,)),
    Method("bergson GradCos, 16 x 16", lambda task: _scores(task, False, True), True, (CHARGPT,)),
    Method("bergson autocorrelation, 16 x 16", lambda task: _scores(task, True, False), True, (CHARGPT,)),
    Method("bergson autocorrelation, 16 x 16, unit norm", lambda task: _scores(task, True, True), True, (CHARGPT,)),
]
