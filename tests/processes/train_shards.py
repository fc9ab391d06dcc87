"""Stages under FSDP2, one after the other: `train_shards.py LEDGER FOLDER`, from FOLDER/zero-end.safetensors.

Before the last one weights are changed without a record, so that it has no parent. While they are recorded no weight
may be put together in one process: ``full_tensor`` is broken. FOLDER gets what process 0 puts together by itself:
``STAGE-WHEN.safetensors`` and ``STAGE-WHEN.moments.safetensors``.
"""

from __future__ import annotations

import gc
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from trainer_attrib.capture import sharded_weights
from trainer_attrib.capture.recorder import Recorder

STEPS, BATCH = 6, 4  # of both processes together


class Uneven(nn.Module):
    """Rows that two processes cannot share evenly, one that is a single row, and a layer that is left out of it."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 7)
        self.hidden = nn.Linear(7, 9)
        self.gate = nn.Linear(9, 1)
        self.replicated = nn.Linear(9, 9, bias=False)
        self.head = nn.Linear(9, 5, bias=False)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """[B, S] -> logits [B, 5]."""
        self.seen += 1
        hidden = torch.tanh(self.hidden(self.embedding(input_ids)))
        return self.head((self.replicated(hidden) * torch.sigmoid(self.gate(hidden))).mean(1))


def data() -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens [N, 6] and labels [N] of one stage."""
    draw = torch.Generator().manual_seed(1)
    return torch.randint(11, (STEPS * BATCH, 6), generator=draw), torch.randint(5, (STEPS * BATCH,), generator=draw)


def stage(name: str, ledger: str, model: Any, optimizer: Any, broken_off: int = 0) -> None:
    """Record one stage, on any number of processes; one that breaks off after some steps goes on from there."""

    def recorder() -> Recorder:
        return Recorder(
            ledger, stage=name, model=model, optimizer=optimizer, total_steps=STEPS, snapshots=1, strict=True
        )

    recording = recorder().start()
    for step in range(STEPS):
        if step and step == broken_off:
            recording.interrupt("stopped")
            recording = recorder().start(after_step=step)
        train(step, model, optimizer, recording)
    recording.finish()


def train(step: int, model: Any, optimizer: Any, recorder: Recorder) -> None:
    """One step of the training."""
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    tokens, labels = data()
    mine = torch.arange(step * BATCH, (step + 1) * BATCH)[rank * BATCH // size : (rank + 1) * BATCH // size]
    with recorder.batch(ids=[f"example-{i}" for i in mine.tolist()]):
        loss = nn.functional.cross_entropy(model(tokens[mine]), labels[mine])
        recorder.note_loss(loss)
        loss.backward()
    if size > 1:  # FSDP2 leaves it to the training to average what it does not shard
        gradient = model.replicated.weight.grad
        dist.all_reduce(gradient)
        gradient /= size
    optimizer.step()
    optimizer.zero_grad()


def _whole(value: Any) -> torch.Tensor:
    return (_full(value) if isinstance(value, DTensor) else value).detach().clone().contiguous()


def _keep(folder: str, name: str, model: Any, optimizer: Any) -> None:
    named = dict(model.named_parameters())
    weights = {key: _whole(parameter) for key, parameter in named.items()}
    moments = {key: _whole(optimizer.state[parameter]["exp_avg_sq"]) for key, parameter in named.items()
               if optimizer.state.get(parameter)}  # fmt: skip
    if dist.get_rank() == 0:
        save_file(weights, f"{folder}/{name}.safetensors")
        save_file(moments, f"{folder}/{name}.moments.safetensors")


def _refused(self: Any) -> Any:
    raise AssertionError("a weight was put together in one process")


_full = DTensor.full_tensor


def main(ledger: str, folder: str) -> None:
    """Train."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    sharded_weights.PIECE = 64  # bytes: several pieces for each shard
    dist.init_process_group("gloo")
    model: Any = Uneven()
    model.load_state_dict(load_file(f"{folder}/zero-end.safetensors"), strict=False)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in (model.embedding, model.hidden):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh, ignored_params={model.replicated.weight})
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for name in ("one", "two", "apart"):
        if name == "apart":
            with torch.no_grad():
                model.head.weight.mul_(1.5)
        _keep(folder, f"{name}-start", model, optimizer)
        DTensor.full_tensor = _refused
        stage(name, ledger, model, optimizer, broken_off=4 if name == "two" else 0)
        DTensor.full_tensor = _full
        _keep(folder, f"{name}-end", model, optimizer)
    dist.barrier()
    del model, layer, optimizer, mesh
    gc.collect()  # as in train.py: what is left to the interpreter's end may abort the process
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
