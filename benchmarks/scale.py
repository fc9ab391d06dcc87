"""How scanning grows with the number of rows: time per row, memory at its peak, and two processes beside one.

A recorded stage of one linear layer (rows of 4096 numbers) is continued with synthetic parts, as many as are asked for.
Every scan is a new process: CPU and wall time of the scan alone, and by how much the process grew.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import report

from trainer_attrib import Ledger
from trainer_attrib.ledger.schema import Block
from trainer_attrib.ledger.writer import StageWriter

BLOCK, WIDTH, KEEP = 2048, 4096, 100
SCAN = Path(__file__).parent / "scale_runs" / "scan.py"


def grown(folder: Path, rows: int) -> None:
    """Let a stage have so many rows, by adding parts to it."""
    stage = Ledger(folder).stage("one")
    generator = np.random.default_rng(0)
    unit = generator.standard_normal((BLOCK, WIDTH), np.float32)
    unit = (unit / np.linalg.norm(unit, axis=1, keepdims=True)).astype(np.float16)
    writer = StageWriter(stage.storage, "stages/one", stage.codec("float16"))
    known = stage.count("rows")
    for first in range(known, rows, BLOCK):
        count = min(BLOCK, rows - first)
        step = first // 512 + 1
        told = {"captured": True, "rows": count, "learning_rate": [1e-3], "beta1": [0.0], "projected_weights": None}
        block = Block({"step": step, **told})
        block.sketches = np.roll(unit[:count], first // BLOCK, axis=1)
        same = {"step": step, "rank": 0, "micro_batch": 0, "norm": 1.0, "denominator": float(count), "version": 0}
        ids = [f"example-{number}" for number in range(first, first + count)]
        block.rows = [{"example": name, "row": row, "complete": True, **same} for row, name in enumerate(ids)]
        block.examples = [{"example": name, "source": "web", "text": f"text of {name}"} for name in ids]
        writer.put(lambda block=block: block)
        writer.flush()
    writer.close()


def command(folder: Path, queries: int, processes: int = 1) -> list[str]:
    """One scan by so many new processes together."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)] * (processes > 1)
    runner = "torchrun" if processes > 1 else "serial"
    return [sys.executable, *launcher, str(SCAN), str(folder), str(queries), "grad_cos", runner, str(KEEP)]


def told(printed: str) -> dict[str, Any]:
    """What the first process of a scan says of itself."""
    return json.loads(next(line for line in printed.splitlines() if line.startswith("{")))


def scanned(folder: Path, queries: int, processes: int = 1) -> dict[str, Any]:
    """One scan."""
    done = subprocess.run(command(folder, queries, processes), capture_output=True, text=True, check=True)
    return told(done.stdout)


def at_once(folder: Path, queries: int) -> float:
    """Wall time of two scans that know nothing of each other, the slower one: what the machine has two cores for."""
    both = [subprocess.Popen(command(folder, queries), stdout=subprocess.PIPE, text=True) for _ in range(2)]
    return max(told(process.communicate()[0])["wall"] for process in both)


def main() -> None:
    arguments = report.parser((__doc__ or "").splitlines()[0]).parse_args()
    sizes, repeats = ((4_096, 16_384), 1) if arguments.quick else ((10_000, 100_000, 1_000_000), arguments.seeds or 3)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "ledger"
        subprocess.run([sys.executable, str(SCAN), str(folder), "0", "record", "serial", "0"], check=True)
        for size in sizes:
            grown(folder, size)
            turns = [
                (scanned(folder, 16), scanned(folder, 16, 2), at_once(folder, 16)) for _ in range(repeats)
            ]  # by turns: the machine's speed changes from minute to minute
            ones, twos, alone = zip(*turns, strict=True)
            cpu, peak, bare = (median(found[key] for found in ones) for key in ("cpu", "peak", "raw"))
            gigabytes = size * WIDTH * 2 / 1e9
            rows.append(
                {
                    "rows": size, "GB": gigabytes, "CPU s per GB": cpu / gigabytes, "over bare products": cpu / bare,
                    "peak MB": peak / 1e6, "of which before": ones[0]["before"] / 1e6,
                    "speedup, 2 processes": median(o["wall"] / t["wall"] for o, t in zip(ones, twos, strict=True)),
                    "2 scans at once": median(2 * o["wall"] / wall for o, wall in zip(ones, alone, strict=True)),
                    "same answer": float(all(o["answer"] == t["answer"] for o, t in zip(ones, twos, strict=True))),
                }
            )  # fmt: skip
    before, last = rows[-2:]
    grows, slope = (last[key] / before[key] for key in ("peak MB", "CPU s per GB"))
    checks = {
        "peak memory, largest over tenth of it": report.check(grows, 1.5),
        "two processes, speedup": report.check(last["speedup, 2 processes"], 1.6, most=False),
        "same answers": report.check(min(r["same answer"] for r in rows), 1.0, most=False),
        "time per row, largest over tenth of it": report.check(slope, 1.2),
    }
    report.publish("scale", rows, checks, quick=arguments.quick)


if __name__ == "__main__":
    main()
