"""dattri-llm: hooks and factorized gradients; K-FAC and EK-FAC."""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from dattri_llm import REGISTER_ALL, AttributionArguments, AttributionTask, HookManagerConfig
from dattri_llm.attribution import EKFACAttributor, KFACAttributor, TracInAttributor
from torch import Tensor

from lds_runs.adapters.task import Method, Task

PACKAGE, INSTALL = "dattri-llm", "dattri-llm==0.1.0"


def _scores(task: Task, attributor: Any, **options: Any) -> Tensor:
    model = task.model()
    asked = AttributionTask(loss_func=lambda m, batch: task.losses(m(batch[0]), batch[1]).sum(), model=model)
    with tempfile.TemporaryDirectory() as folder:
        arguments = AttributionArguments(
            output_dir=folder, per_device_train_batch_size=100, per_device_eval_batch_size=100, use_cpu=True
        )
        found = attributor(arguments, task=asked).attribute(
            task.train_set(), task.test_set(), hook_config=HookManagerConfig(linear_io=REGISTER_ALL), **options
        )
    shares_NQ = found.agnostic_matrix()[1]
    known, copies = _samples(task.train[0])
    return (shares_NQ / copies[:, None])[known][:, _samples(task.test[0])[0]].T


def _samples(inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Number of each example among those that differ, in the order of their first one, and how often each of these
    occurs: examples are known to this library by their content, so that equal ones are one, with the sum of scores."""
    numbers: dict[bytes, int] = {}
    found = torch.tensor([numbers.setdefault(row.numpy().tobytes(), len(numbers)) for row in inputs])
    return found, torch.bincount(found)


METHODS = [
    Method("dattri-llm GradDot", lambda task: _scores(task, TracInAttributor), default=True),
    Method("dattri-llm EK-FAC, default", lambda task: _scores(task, EKFACAttributor), default=True),
    Method(
        "dattri-llm EK-FAC, relative damping 0.1",
        lambda task: _scores(task, EKFACAttributor, damping=0.1, relative_damping=True),
    ),
    Method("dattri-llm K-FAC, default", lambda task: _scores(task, KFACAttributor), default=True),
    Method(
        "dattri-llm K-FAC, relative damping 0.1",
        lambda task: _scores(task, KFACAttributor, damping=0.1, relative_damping=True),
    ),
]
