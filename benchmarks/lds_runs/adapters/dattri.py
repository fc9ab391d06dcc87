"""dattri: influence functions by conjugate gradients, at its defaults and at the best setting of one checkpoint known.

Its curvature is that of one batch after another, so that a loader of small batches ruins the scores; tuned, all
examples are one batch, which a language model's memory does not allow.
"""

from __future__ import annotations

from typing import Any

import torch
from dattri.algorithm.influence_function import IFAttributorCG, IFAttributorEKFAC
from dattri.task import AttributionTask
from torch import Tensor
from torch.func import functional_call
from torch.utils.data import DataLoader

from lds_runs.adapters.task import DIGITS, Method, Task

PACKAGE = "dattri"


def _scores(task: Task, attributor: Any, batch_size: int, **options: Any) -> Tensor:
    model = task.model()

    def loss(parameters: Any, batch: Any) -> Tensor:
        return task.losses(functional_call(model, parameters, (batch[0],)), batch[1]).mean()

    asked = AttributionTask(loss_func=loss, model=model, checkpoints=model.state_dict())
    chosen = attributor(task=asked, device="cpu", **options)
    chosen.cache(DataLoader(task.train_set(), batch_size=batch_size))
    with torch.no_grad():
        # Its conjugate gradients run again for every batch of examples to be scored: here there is one.
        loaders = (DataLoader(part, batch_size=len(part)) for part in (task.train_set(), task.test_set()))
        return chosen.attribute(*loaders).T


METHODS = [
    Method("dattri IF-CG, default, batches of 100", lambda task: _scores(task, IFAttributorCG, 100), True, (DIGITS,)),
    Method("dattri EK-FAC, default", lambda task: _scores(task, IFAttributorEKFAC, 100), default=True),
    Method("dattri EK-FAC, damping 0.1", lambda task: _scores(task, IFAttributorEKFAC, 100, damping=0.1)),
    *(
        Method(
            f"dattri IF-CG, {iterations} iterations, 0.01, one batch",
            lambda task, n=iterations: _scores(
                task, IFAttributorCG, len(task.train[0]), max_iter=n, regularization=1e-2
            ),
            testbeds=(DIGITS,),
        )
        for iterations in (5, 10)
    ),
]
