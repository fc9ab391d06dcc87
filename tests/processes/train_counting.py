"""Counts collective calls of each training step, plain and recorded: `train_counting.py LEDGER OUT`, under torchrun.

Every call of the group that all processes form is counted, whoever makes it: hooks of FSDP2, DDP's reducer in C++,
the recorder. OUT gets {"ddp": {"plain": [calls before the first step, in step 1, 2, ..., at the end], ...}, ...}.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))
os.environ.setdefault("OMP_NUM_THREADS", "1")

import itertools

import torch
import torch.distributed as dist
from torch import nn

from tests.processes.train import Classifier, distributed
from trainer_attrib.capture.recorder import Recorder

STEPS = 14


def calls() -> int:
    """Collective calls of the default group so far."""
    group: Any = dist.group.WORLD
    return group._get_sequence_number_for_group()


def counted(how: str, ledger: str | None) -> list[int]:
    """Calls before the first step, in each step and at the end."""
    torch.manual_seed(0)
    model: Any = distributed(how, Classifier())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    marks = [calls()]
    recorder = None
    if ledger:
        recorder = Recorder(ledger, stage=how, model=model, optimizer=optimizer, total_steps=STEPS, snapshots=1).start()
    marks.append(calls())
    for _ in range(STEPS):
        loss = nn.functional.cross_entropy(model(torch.randint(11, (2, 6))), torch.randint(5, (2,)))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        marks.append(calls())
    if recorder:
        recorder.finish()
        assert recorder.fault is None
    marks.append(calls())
    return [after - before for before, after in itertools.pairwise(marks)]


def main(ledger: str, out: str) -> None:
    """Count."""
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    found = {how: {"plain": counted(how, None), "recorded": counted(how, ledger)} for how in ("ddp", "fsdp")}
    if dist.get_rank() == 0:
        Path(out).write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
