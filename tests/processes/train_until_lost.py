"""A training that loses a process: `train_until_lost.py HOW LEDGER SNAPSHOT RANK SIZE LOST`, once for each rank.

Everything is sealed after step 6, as a checkpoint does; the lost rank kills itself in step 10, after its forward pass.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import torch.distributed as dist
from torch import nn

from tests.processes.train import BATCH, Classifier, distributed
from trainer_attrib.capture.recorder import Recorder

SEALED, KILLED, STEPS = 6, 10, 14


def batch_of(step: int, rank: int, size: int) -> tuple[list[str], torch.Tensor, torch.Tensor]:
    """Ids, tokens and labels of one process's part of a step, counted from 1."""
    draw = torch.Generator().manual_seed(step)
    tokens, labels = torch.randint(11, (BATCH, 6), generator=draw), torch.randint(5, (BATCH,), generator=draw)
    mine = slice(rank * BATCH // size, (rank + 1) * BATCH // size)
    return [f"{step}/{place}" for place in range(BATCH)][mine], tokens[mine], labels[mine]


def main(how: str, ledger: str, store: str, rank: int, size: int, lost: int) -> None:
    """Train until one is killed; the others get to know by their next collective."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    model = distributed(how, Classifier())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with Recorder(ledger, stage="one", model=model, optimizer=optimizer, total_steps=STEPS, snapshots=1) as recorder:
        for step in range(1, STEPS + 1):
            ids, tokens, labels = batch_of(step, rank, size)
            with recorder.batch(ids=ids):
                loss = nn.functional.cross_entropy(model(tokens), labels)
                if step == KILLED and rank == lost:
                    os.kill(os.getpid(), signal.SIGKILL)
                loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if step == SEALED:
                recorder.checkpoint()


if __name__ == "__main__":
    main(*sys.argv[1:4], *map(int, sys.argv[4:]))
