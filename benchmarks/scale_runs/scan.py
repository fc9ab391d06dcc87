"""One scan in a process of its own: `scan.py LEDGER QUERIES RECIPE RUNNER KEEP`; prints what it took as JSON.

With the recipe `record` it records the stage that scans are of.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).parents[1]))

import pandas  # noqa: F401  # half a second in which nothing is scanned: pyarrow imports it for its first array
import torch
from memory import peak
from retrieval import question, raw, recorded
from torch import nn

from trainer_attrib import Ledger
from trainer_attrib.analysis.influence import influence
from trainer_attrib.execution.choice import runner_of


def main() -> None:
    folder, queries, recipe, runner, keep = sys.argv[1:]
    torch.set_num_threads(1)
    if recipe == "record":
        recorded(Path(folder), "float16", 512)
        return
    model, stage = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Tanh()), Ledger(folder).stage("one")
    asked = question(model, stage, int(queries), runner=runner_of(runner), keep=int(keep))
    before, cpu, wall = peak(), time.process_time(), time.perf_counter()
    found = influence(asked, recipe)
    spent = {"cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall, "before": before, "peak": peak()}
    told = found.top(20).select(["example", "score"]).to_pylist()
    spent["answer"] = hashlib.blake2b(repr(told).encode()).hexdigest()
    began = time.process_time()
    if runner == "serial":
        raw(stage, asked.carried(stage, 0), (4 << 20) // (4 * stage.width))  # type: ignore[misc]
    spent["raw"] = time.process_time() - began
    if os.environ.get("RANK", "0") == "0":
        print(json.dumps(spent), flush=True)


if __name__ == "__main__":
    main()
