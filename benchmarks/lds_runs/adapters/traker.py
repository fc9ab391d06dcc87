"""traker: TRAK of one model, or of several from other seeds."""

from __future__ import annotations

import logging
import tempfile
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.data import DataLoader
from trak import TRAKer
from trak.modelout_functions import AbstractModelOutput, ImageClassificationModelOutput

from lds_runs.adapters.task import CHARGPT, DIGITS, Method, Task

PACKAGE = "traker"
TUNED = 100.0  # ridge; 1000 examples, gradients of float32


class _LogProbability(AbstractModelOutput):
    """Of the next characters; the loss is minus it."""

    def __init__(self) -> None:
        super().__init__()

    @staticmethod
    def get_output(model: nn.Module, weights: Any, buffers: Any, window: Tensor, target: Tensor) -> Tensor:
        logits = functional_call(model, (weights, buffers), (window.unsqueeze(0),))[0, :-1]
        return logits.log_softmax(-1).gather(1, target[1:, None]).mean()

    def get_out_to_loss_grad(self, model: nn.Module, weights: Any, buffers: Any, batch: Any) -> Tensor:
        return torch.ones(len(batch[0]), 1)


def _scores(task: Task, models: int, size: int, ridge: float) -> np.ndarray:
    model = task.model()
    output = ImageClassificationModelOutput() if task.testbed == DIGITS else _LogProbability()
    with tempfile.TemporaryDirectory() as folder:
        trak = TRAKer(
            model, output, len(task.train[0]), save_dir=folder, device="cpu", proj_dim=size, lambda_reg=ridge,
            use_half_precision=False, logging_level=logging.ERROR,
        )  # fmt: skip
        for number, weights in enumerate(task.ensemble[:models]):
            trak.load_checkpoint(weights, model_id=number)
            for batch in DataLoader(task.train_set(), batch_size=100):
                trak.featurize(batch=batch, num_samples=len(batch[0]))
        trak.finalize_features()
        for number, weights in enumerate(task.ensemble[:models]):
            trak.start_scoring_checkpoint("queries", weights, number, num_targets=len(task.test[0]))
            for batch in DataLoader(task.test_set(), batch_size=100):
                trak.score(batch=batch, num_samples=len(batch[0]))
        return np.array(trak.finalize_scores("queries")).T


METHODS = [
    Method("traker TRAK-1, default", lambda task: _scores(task, 1, 2048, 0.0), True, (DIGITS,)),
    Method("traker TRAK-1, 512", lambda task: _scores(task, 1, 512, 0.0)),
    Method("traker TRAK-1, 512, ridge 100", lambda task: _scores(task, 1, 512, TUNED), testbeds=(DIGITS,)),
    Method("traker TRAK-10, 512", lambda task: _scores(task, 10, 512, 0.0), testbeds=(DIGITS,), models=9),
    Method("traker TRAK-10, 512, ridge 100", lambda task: _scores(task, 10, 512, TUNED), testbeds=(DIGITS,), models=9),
    Method("traker TRAK-3, 512, ridge 100", lambda task: _scores(task, 3, 512, TUNED), testbeds=(CHARGPT,), models=2),
]
