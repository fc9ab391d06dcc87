"""A loop with ``Accelerator``, as its documentation writes it: `train_accelerate.py LEDGER WEIGHTS`."""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from torch.utils.data import DataLoader

from tests.processes.train import Classifier
from trainer_attrib.capture.recorder import Recorder

EXAMPLES, BATCH = 48, 4  # of all processes together


def main(ledger: str, weights: str) -> None:
    """Train with gradient accumulation and clipping, and store the weights."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = Classifier()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    rows = [
        {"id": i, "input_ids": torch.randint(11, (6,)), "labels": int(torch.randint(5, ()))} for i in range(EXAMPLES)
    ]
    loader = DataLoader(rows, batch_size=BATCH // accelerator.num_processes)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    with Recorder(ledger, stage="one", model=model, optimizer=optimizer) as recorder:
        for batch in loader:
            with accelerator.accumulate(model), recorder.batch(ids=batch["id"]):
                loss = torch.nn.functional.cross_entropy(model(batch["input_ids"]), batch["labels"])
                recorder.note_loss(loss / accelerator.gradient_accumulation_steps)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 0.2)
                optimizer.step()
                optimizer.zero_grad()
    if accelerator.is_main_process:
        trained = accelerator.unwrap_model(model)
        save_file({name: value.detach().clone() for name, value in trained.named_parameters()}, weights)
    accelerator.end_training()


if __name__ == "__main__":
    main(*sys.argv[1:])
