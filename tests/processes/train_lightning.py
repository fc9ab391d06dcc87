"""Lightning's trainer on a tiny model: `train_lightning.py LEDGER WEIGHTS`, in one process or in several."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))
os.environ.setdefault("OMP_NUM_THREADS", "1")

import lightning
import torch
from safetensors.torch import save_file
from torch.utils.data import DataLoader, DistributedSampler

from tests.processes.train import Classifier
from trainer_attrib.integrations.lightning import AttributionCallback

EXAMPLES, BATCH = 48, 4  # of all processes together


class Module(lightning.LightningModule):
    """The classifier with its training step."""

    def __init__(self) -> None:
        super().__init__()
        self.classifier = Classifier()

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> torch.Tensor:
        """Mean cross entropy."""
        return torch.nn.functional.cross_entropy(self.classifier(batch["input_ids"]), batch["labels"])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW."""
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def main(ledger: str, weights: str) -> None:
    """Train and store the weights."""
    warnings.simplefilter("ignore")
    size = int(os.environ.get("WORLD_SIZE", 1))
    torch.set_num_threads(1)
    torch.manual_seed(0)
    module = Module()
    rows = [
        {"id": f"row-{i}", "input_ids": torch.randint(11, (6,)), "labels": int(torch.randint(5, ()))}
        for i in range(EXAMPLES)
    ]
    trainer = lightning.Trainer(
        accelerator="cpu", devices=size, strategy="ddp" if size > 1 else "auto", max_epochs=1, logger=False,
        enable_checkpointing=False,
        use_distributed_sampler=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[AttributionCallback(ledger, stage="one")],
    )  # fmt: skip
    sampler = DistributedSampler(rows, size, int(os.environ.get("LOCAL_RANK", 0)), shuffle=False)
    trainer.fit(module, DataLoader(rows, batch_size=BATCH // size, sampler=sampler))
    if trainer.is_global_zero:
        save_file({name: value.detach().clone() for name, value in module.named_parameters()}, weights)


if __name__ == "__main__":
    main(*sys.argv[1:])
