"""Finding training examples in a recorded stage: how fast rows are scanned, and whether the shortcuts find the same.

Times are process CPU times, medians of alternating runs; throughput is a ratio to multiplying the same memory-mapped
shards with the same queries, a whole shard converted to float32 at a time ("raw") or a few megabytes ("raw, chunked").
Of the tables beside the shards, which say whose the rows are, only the scans read anything.
"""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import numpy as np
import report
import torch
from torch import Tensor, nn

from trainer_attrib import Ledger, Recorder, SketchConfig
from trainer_attrib.analysis.influence import influence
from trainer_attrib.analysis.recipes.recipe import Question
from trainer_attrib.analysis.retrieval.where import Where
from trainer_attrib.execution.runner import Runner, Serial
from trainer_attrib.ledger.reader import StageReader
from trainer_attrib.ledger.schema import part_files

SIDE, BATCH = 64, 512  # rows of 64 x 64 numbers


def recorded(folder: Path, dtype: str, rows: int) -> tuple[nn.Module, StageReader]:
    """One epoch of a linear layer without projection, every tenth example of source "rare"."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(SIDE, SIDE, bias=False), nn.Tanh())
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    sketch = SketchConfig(rank=SIDE, dtype=dtype, correction="none")
    with Recorder(folder, stage="one", model=model, optimizer=optimizer, sketch=sketch) as recorder:
        for first in range(0, rows, BATCH):
            names = [f"example-{first + row}" for row in range(BATCH)]
            sources = ["rare" if row % 10 == 0 else "common" for row in range(BATCH)]
            optimizer.zero_grad()
            with recorder.batch(names, sources=sources, denominator=BATCH):
                model(torch.randn(BATCH, 8, SIDE)).square().sum((1, 2)).mean().backward()
            optimizer.step()
    return model, Ledger(folder).stage("one")


def question(
    model: nn.Module, stage: StageReader, queries: int, runner: Runner | None = None, **choices: Any
) -> Question:
    """Queries with sketches that are known, so that only the scan is measured."""
    generator = torch.Generator().manual_seed(1)
    sketches_QK = torch.randn(queries, stage.width, generator=generator)
    behavior = SimpleNamespace(name="any", queries=[f"query {q}" for q in range(queries)])
    named = type("Behavior", (), {"name": "any", "queries": behavior.queries, "__len__": lambda self: queries})()
    lineage: Any = SimpleNamespace(model=model, behaviors=[named], runner=runner or Serial())
    return Question(lineage, [stage], {}, lambda *_: sketches_QK, **choices)


def raw(stage: StageReader, sketches_QK: Tensor, chunk: int | None) -> list[np.ndarray]:
    """The bare products of all shards."""
    found, record = [], stage.codec(stage.meta["sketch"]["dtype"]).record
    for part in stage.parts():
        shard = part_files(part, "rows", 2)[1]
        rows_NK = stage.storage.records(f"stages/{stage.name}/{shard}", record, part["rows"])
        step = chunk or len(rows_NK)
        for first in range(0, len(rows_NK), step):
            unit_NK = torch.from_numpy(rows_NK[first : first + step]).float()
            found.append((sketches_QK @ unit_NK.T).numpy())
    return found


def times(functions: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median CPU seconds of each, alternating."""
    spent: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats + 1):
        for name, function in functions.items():
            begun = time.process_time()
            function()
            spent[name].append(time.process_time() - begun)
    return {name: median(found[1:]) for name, found in spent.items()}  # the first brings the shards into memory


def throughput(dtype: str, rows: int, repeats: int) -> list[dict[str, Any]]:
    """Scans against bare products."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        model, stage = recorded(Path(folder), dtype, rows)
        chunk = (4 << 20) // (4 * stage.width)
        for queries in (1, 16, 128):
            sketches_QK = question(model, stage, queries).carried(stage, 0)  # type: ignore[misc]
            where = {"where": Where(sources=["rare"])}
            spent = times(
                {
                    "raw": lambda q=sketches_QK: raw(stage, q, None),
                    "chunked": lambda q=sketches_QK: raw(stage, q, chunk),
                    "all": lambda n=queries: influence(question(model, stage, n), "grad_cos"),
                    "ends": lambda n=queries: influence(question(model, stage, n, keep=100), "grad_cos"),
                    "rare": lambda n=queries, w=where: influence(question(model, stage, n, keep=100, **w), "grad_cos"),
                    "steps": lambda n=queries: influence(
                        question(model, stage, n, keep=100, where=Where(steps=(1, rows // BATCH // 8))), "grad_cos"
                    ),
                },
                repeats,
            )
            found.append(
                {
                    "rows": f"{rows:,} x {stage.width} {dtype}",
                    "queries": queries,
                    "scan / raw": spent["raw"] / spent["all"],
                    "both ends / raw": spent["raw"] / spent["ends"],
                    "scan / raw, chunked": spent["chunked"] / spent["all"],
                    "speedup, source of 10 %": spent["ends"] / spent["rare"],
                    "speedup, 1/8 of the steps": spent["ends"] / spent["steps"],
                    "both ends equal": same_ends(model, stage, queries),
                }
            )
    return found


def same_ends(model: nn.Module, stage: StageReader, queries: int) -> bool:
    """Whether the kept ends are those of all scores, bit by bit."""
    dense, ends = (influence(question(model, stage, queries, keep=keep), "grad_cos") for keep in (None, 100))
    return all(
        getattr(ends, end)(100)
        .select(["example", "score"])
        .equals(getattr(dense, end)(100).select(["example", "score"]))
        for end in ("top", "bottom")
    )


def main() -> None:
    arguments = report.parser(__doc__ or "").parse_args()
    logging.getLogger("trainer_attrib").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    rows, repeats = (4096, 3) if arguments.quick else (65_536, 7)
    found = [row for dtype in ("float16", "float32") for row in throughput(dtype, rows, repeats)]
    halves = [row for row in found if "float16" in row["rows"]]
    checks = {
        "scan_to_raw_float16": report.check(min(row["scan / raw"] for row in halves), 0.8, most=False),
        "both_ends_to_raw_float16": report.check(min(row["both ends / raw"] for row in halves), 0.8, most=False),
        "scan_to_raw_float32": report.check(min(r["scan / raw"] for r in found if r not in halves), 0.8, most=False),
        "both_ends_equal": report.check(float(all(row["both ends equal"] for row in found)), 1.0, most=False),
    }
    report.publish("retrieval", found, checks, quick=arguments.quick)


if __name__ == "__main__":
    main()
