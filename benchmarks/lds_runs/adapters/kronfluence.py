"""kronfluence: EK-FAC influence functions."""

from __future__ import annotations

import logging
import tempfile
from typing import Any

from kronfluence.analyzer import Analyzer, prepare_model
from kronfluence.arguments import FactorArguments, ScoreArguments
from kronfluence.task import Task as Objective
from torch import Tensor, nn
from torch.distributions import Categorical

from lds_runs.adapters.task import DIGITS, Method, Task

PACKAGE = "kronfluence"


class _Objective(Objective):
    def __init__(self, task: Task) -> None:
        super().__init__()
        self._task = task

    def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
        outputs, targets = model(batch[0]), batch[1]
        if sample:
            drawn = Categorical(logits=outputs.detach()).sample()
            if self._task.testbed == DIGITS:
                targets = drawn
            else:
                targets = targets.clone()
                targets[:, 1:] = drawn[:, :-1]
        return self._task.losses(outputs, targets).sum()

    def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
        return self.compute_train_loss(batch, model)


def _scores(task: Task, damping: float | None) -> Tensor:
    objective = _Objective(task)
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as folder:
        analyzer = Analyzer(
            "run", prepare_model(task.model(), objective), objective, cpu=True, output_dir=folder,
            disable_tqdm=True, disable_model_save=True,
        )  # fmt: skip
        analyzer.fit_all_factors(
            "factors", task.train_set(), per_device_batch_size=100, factor_args=FactorArguments(strategy="ekfac")
        )
        analyzer.compute_pairwise_scores(
            "scores", "factors", task.test_set(), task.train_set(), per_device_query_batch_size=100,
            per_device_train_batch_size=100, score_args=ScoreArguments(damping_factor=damping),
        )  # fmt: skip
        return analyzer.load_pairwise_scores("scores")["all_modules"]


METHODS = [
    Method("kronfluence EK-FAC, default", lambda task: _scores(task, 1e-8), default=True),
    Method("kronfluence EK-FAC, damping None", lambda task: _scores(task, None)),
]
