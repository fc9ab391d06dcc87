"""A process that asks a recorded stage the same question several times: `ask.py LEDGER QUERIES KEEP TIMES`; prints what
it took as JSON, and what bare products of the same rows take."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from memory import peak
from retrieval import question, raw
from torch import nn

from trainer_attrib import Ledger
from trainer_attrib.analysis.influence import influence


def main() -> None:
    folder, (queries, keep, times) = sys.argv[1], map(int, sys.argv[2:])
    torch.set_num_threads(1)
    model, before, spent = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Tanh()), peak(), []
    for _ in range(times):
        began = time.process_time()
        stage = Ledger(folder).stage("one")
        found = influence(question(model, stage, queries, keep=keep), "grad_cos")
        spent.append(time.process_time() - began)
    grown, names = peak() - before, found.top(keep).to_pylist()
    sketches_QK = question(model, stage, queries).carried(stage, 0)  # type: ignore[misc]
    bare = []
    for _ in range(times):
        began = time.process_time()
        raw(stage, sketches_QK, (4 << 20) // (4 * stage.width))
        bare.append(time.process_time() - began)
    best = [[row["example"] for row in names if row["query"] == name] for name in found.queries]
    print(json.dumps({"spent": spent, "grown": grown, "bare": bare, "best": best, "bytes": stage.bytes}))


if __name__ == "__main__":
    main()
