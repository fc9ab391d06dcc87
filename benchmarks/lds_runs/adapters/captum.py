"""captum: TracIn over checkpoints, weighted by their learning rates; Linear layers only."""

from __future__ import annotations

from typing import Any

import torch
from captum.influence import TracInCP
from torch import Tensor, nn

from lds_runs.adapters.task import Method, Task

PACKAGE = "captum"


class _Sum(nn.Module):
    reduction = "sum"  # which captum asks for

    def __init__(self, task: Task) -> None:
        super().__init__()
        self._task = task

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return self._task.losses(outputs, targets).sum()


def _scores(task: Task, checkpoints: list[int]) -> Tensor:
    def load(model: nn.Module, number: Any) -> float:
        model.load_state_dict(task.checkpoints[number])
        return task.rates[number]

    tracin = TracInCP(
        task.model(), task.train_set(), checkpoints, checkpoints_load_func=load, loss_fn=_Sum(task), batch_size=100,
        sample_wise_grads_per_batch=True,
    )  # fmt: skip
    found = tracin.influence((task.test[0], task.test[-1]))
    assert isinstance(found, torch.Tensor)
    return found


METHODS = [
    Method("captum TracInCP, last checkpoint", lambda task: _scores(task, [len(task.checkpoints) - 1])),
    Method("captum TracInCP, all checkpoints", lambda task: _scores(task, [*range(len(task.checkpoints))]), True),
]
