"""Training scripts that the tests start in one process or in two: `train.py HOW LEDGER WEIGHTS [FAULT]`."""

from __future__ import annotations

import gc
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import nn

from trainer_attrib.capture.recorder import Recorder
from trainer_attrib.capture.step_recorder import StepRecorder
from trainer_attrib.ledger.writer import StageWriter
from trainer_attrib.types import SketchConfig

STEPS, BATCH = 14, 4  # of all processes together; second moments are folded in after steps 4 and 12


class Classifier(nn.Module):
    """Two biased layers and an embedding; its sizes do not divide by the number of processes."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 7)
        self.hidden = nn.Linear(7, 9)
        self.head = nn.Linear(9, 5, bias=False)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """[B, S] -> logits [B, 5]."""
        return self.head(torch.tanh(self.hidden(self.embedding(input_ids))).mean(1))


def main(how: str, ledger: str, weights: str, fault: str = "") -> None:
    """Train as ``how`` says: alone, ddp or fsdp."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model: Any = Classifier()
    tokens, labels = torch.randint(11, (STEPS * BATCH, 6)), torch.randint(5, (STEPS * BATCH,))
    rank, size = 0, 1
    if how != "alone":
        dist.init_process_group("gloo")
        rank, size = dist.get_rank(), dist.get_world_size()
    trained = distributed(how, model)
    optimizer = torch.optim.AdamW(trained.parameters(), lr=1e-2)
    _inject(fault, rank)
    recorder = Recorder(
        ledger, stage="one", model=trained, optimizer=optimizer, total_steps=STEPS, snapshots=1,
        sketch=SketchConfig(dtype="float32"),  # of which more can be compared than of the default's float16
    ).start()  # fmt: skip
    for step in range(STEPS):
        mine = torch.arange(step * BATCH, (step + 1) * BATCH)[rank * BATCH // size : (rank + 1) * BATCH // size]
        with recorder.batch(ids=[f"example-{i}" for i in mine.tolist()]):
            loss = nn.functional.cross_entropy(trained(tokens[mine]), labels[mine])
            recorder.note_loss(loss)
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    recorder.finish()
    values = {n: p.full_tensor() if hasattr(p, "full_tensor") else p for n, p in model.named_parameters()}
    if rank == 0:
        save_file({name: value.detach().contiguous() for name, value in values.items()}, weights)
    if how != "alone":
        dist.barrier()
        # DDP is part of a cycle. Left to the interpreter's end it may let go of the group's threads too late, and the
        # process aborts ("terminate called without an active exception").
        del trained, optimizer, recorder
        gc.collect()
        dist.destroy_process_group()


def distributed(how: str, model: Any) -> Any:
    """The model as DDP or FSDP2 trains it."""
    if how == "ddp":
        return nn.parallel.DistributedDataParallel(model)
    if how == "fsdp":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for layer in (model.embedding, model.hidden, model):
            fully_shard(layer, mesh=mesh)
    return model


def _inject(fault: str, rank: int) -> None:
    """Break one process's capture: in the hooks' first pass, before a step is written, or while writing."""

    def broken(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("injected")

    if rank != 1 or not fault:
        return
    owner, name = {
        "first": (StepRecorder, "_evidence"),
        "write": (StepRecorder, "write"),
        "disk": (StageWriter, "_seal"),
    }[fault]
    original, calls = getattr(owner, name), iter(range(6 if fault == "write" else 0))
    setattr(owner, name, lambda *a, **k: original(*a, **k) if next(calls, None) is not None else broken())


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main(*sys.argv[1:])
