"""One process of `distributed_overhead.py`: ``distributed_work.py HOW STEPS OUT LEDGER``, alone or under torchrun.

The model of ``overhead_work.py`` is trained three times side by side, plain, plain again and recorded, one step of each
in turn. OUT gets the CPU seconds of this process's steps: ``{run: {"thread": [...], "process": [...]}}``.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from overhead_work import BATCH, RANK, TOKENS, VOCABULARY, small_gpt2
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from trainer_attrib import Recorder, SketchConfig

RUNS = ("plain", "plain again", "recorded")


class Run:
    """One training, and what each of its steps cost."""

    def __init__(self, how: str, ledger: Path | None) -> None:
        self.model = _distributed(how, small_gpt2())
        self._optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        self.thread: list[float] = []
        self.process: list[float] = []
        self.recorder = None
        if ledger is not None:
            sketch = SketchConfig(rank=RANK)
            self.recorder = Recorder(
                ledger, stage=how, model=self.model, optimizer=self._optimizer, sketch=sketch, strict=True
            ).start()

    def step(self, tokens: torch.Tensor) -> None:
        """Train on a batch, [B, S]."""
        thread, process = time.thread_time(), time.process_time()
        loss = self.model(input_ids=tokens, labels=tokens).loss
        if self.recorder:
            self.recorder.note_loss(loss)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad()
        self.thread.append(time.thread_time() - thread)
        self.process.append(time.process_time() - process)


def _distributed(how: str, model: Any) -> Any:
    if how == "ddp":
        return nn.parallel.DistributedDataParallel(model)
    if how == "fsdp":
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for block in [*model.transformer.h, model]:
            fully_shard(block, mesh=mesh)
    return model


def main(how: str, steps: str, out: str, ledger: str) -> None:
    """Train and measure."""
    torch.set_num_threads(1)
    if how != "alone":
        dist.init_process_group("gloo")
    rank = dist.get_rank() if how != "alone" else 0
    runs = {name: Run(how, Path(ledger) if name == "recorded" else None) for name in RUNS}
    draw = torch.Generator().manual_seed(rank)
    for step in range(int(steps)):
        tokens = torch.randint(0, VOCABULARY, (BATCH, TOKENS), generator=draw)
        for place in range(len(RUNS)):  # in an order that rotates by one each time
            runs[RUNS[(place + step) % len(RUNS)]].step(tokens)
    recorder = runs["recorded"].recorder
    assert recorder is not None
    recorder.finish()
    found = {name: {"thread": run.thread, "process": run.process} for name, run in runs.items()}
    Path(f"{out}.{rank}").write_text(json.dumps(found))
    if how != "alone":
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
