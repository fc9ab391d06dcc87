"""The optimizers that ``TrainingArguments(optim=...)`` makes: executed updates, and a correction or the reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.support import support
from trainer_attrib.ledger.reader import Ledger
from trainer_attrib.testing.reference import Expected
from trainer_attrib.testing.run import Run, collate

datasets = pytest.importorskip("datasets")
transformers = pytest.importorskip("transformers")

from trainer_attrib.integrations.huggingface import AttributionCallback  # noqa: E402

NEEDS = {"schedule_free_adamw": "schedulefree", "adamw_8bit": "bitsandbytes", "lion_32bit": "bitsandbytes"}
CORRECTED = ("adamw_torch", "adamw_torch_fused", "adafactor", "adagrad", "rmsprop", "schedule_free_adamw")
RAW = ("sgd", "adamw_8bit", "lion_32bit")


class Watching(transformers.TrainerCallback):
    """Keeps the weights after every step."""

    def __init__(self) -> None:
        self.weights: list[dict[str, torch.Tensor]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.weights.append({name: p.detach().double() for name, p in kwargs["model"].named_parameters()})


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=support("Optimizers", f"`TrainingArguments(optim='{name}')`"))
        for name in CORRECTED + RAW
    ],
)
def test_the_recorded_updates_are_those_that_moved_the_weights(name: str, tmp_path: Path) -> None:
    if name in NEEDS:
        pytest.importorskip(NEEDS[name])
    run, watching = Run(tmp_path, tmp_path / "ledger"), Watching()
    arguments = transformers.TrainingArguments(
        str(tmp_path / "out"), per_device_train_batch_size=4, num_train_epochs=2, report_to=[], disable_tqdm=True,
        use_cpu=True, save_strategy="no", logging_strategy="no", learning_rate=1e-2, optim=name, max_grad_norm=0.5,
        lr_scheduler_type="constant",
    )  # fmt: skip
    transformers.Trainer(
        run.model(), arguments, train_dataset=datasets.Dataset.from_list(list(run.examples)), data_collator=collate,
        callbacks=[AttributionCallback(tmp_path / "ledger", stage="one", strict=True), watching],
    ).train()  # fmt: skip
    stage = Ledger(tmp_path / "ledger").stage("one")
    rows = stage.steps()["projected_weights"].to_pylist()
    stored = [torch.from_numpy(np.frombuffer(row, np.float32).copy()).double() for row in rows]
    expected = Expected(run, stage)
    assert len(stored) == 6
    for k in range(1, 6):
        moved = {key: watching.weights[k][key] - watching.weights[k - 1][key] for key in watching.weights[k]}
        update = expected.weights(moved)
        assert float(update.norm()) > 1e-4
        assert float((stored[k] - stored[k - 1] - update).norm() / update.norm()) < 1e-4
    assert bool(stage.meta["correction_unavailable"]) == (name in RAW)
    assert [version["after_step"] for version in stage.meta["versions"]] == ([] if name in RAW else [4])
