"""What recording costs where several processes train one model: DDP and FSDP2 (gloo, 2 processes) beside one process.

Each process trains the 4-layer GPT-2 of ``overhead_work.py`` (batch 8 x 128 tokens of its own, float32, one thread,
clipping, AdamW) three times side by side: plain, plain again (the control), and with AdamW-corrected rows; one step of
each in turn, so that adjacent steps are compared. A step's CPU time is that of the training threads, summed over the
processes; waiting for each other costs none. `with writer` is that of the whole processes meanwhile. Medians over
steps, with a bootstrap standard error; `mean` is the sum over the sum, with the rare steps that fold in second moments.
The ways to train take turns in several rounds. What a stage's start and end cost is not counted.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import report
from distributed_work import RUNS
from overhead_work import WARM, Baton, StepClock, ratios

HERE = Path(__file__).parent
PROCESSES = {"alone": 1, "ddp": 2, "fsdp": 2}
CLOCKS = ("thread", "process")
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]


def measure(how: str, steps: int, folder: Path) -> dict[str, dict[str, list[float]]]:
    """CPU seconds of each step after the first ones, summed over processes: run -> clock -> steps."""
    started_by = [] if PROCESSES[how] == 1 else [*TORCHRUN, str(PROCESSES[how])]
    work = [str(HERE / "distributed_work.py"), how, str(steps), str(folder / "out"), str(folder / "ledger")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent)])}
    ran = subprocess.run([sys.executable, *started_by, *work], env=environment, capture_output=True, text=True)
    if ran.returncode:
        raise SystemExit(f"{how} failed: {ran.stderr[-2000:]}")
    told = [json.loads((folder / f"out.{rank}").read_text()) for rank in range(PROCESSES[how])]
    return {
        run: {
            clock: [sum(times) for times in zip(*(one[run][clock] for one in told), strict=True)][WARM:]
            for clock in CLOCKS
        }
        for run in RUNS
    }


def rows_of(how: str, rounds: list[dict[str, dict[str, list[float]]]]) -> list[dict[str, Any]]:
    """The table's rows of one way to train."""
    clocks = {
        run: StepClock(run, Baton([run]), *([s for found in rounds for s in found[run][clock]] for clock in CLOCKS))
        for run in RUNS
    }
    plain = sum(clocks["plain"].process)
    return [
        {"training": how, "processes": PROCESSES[how], **row, "mean": sum(clocks[row["run"]].process) / plain}
        for row in ratios(clocks)
    ]


def checks_of(rows: list[dict[str, Any]]) -> tuple[dict[str, Any], list[str]]:
    """Several processes against one, and how certain that is."""
    recorded = {row["training"]: row for row in rows if row["run"] == "recorded"}
    checks, notes = {}, []
    for how in ("ddp", "fsdp"):
        more = recorded[how]["step"] - recorded["alone"]["step"]
        checks[f"distributed_overhead_{how}_minus_alone"] = report.check(more, 0.02)
        error = math.hypot(recorded[how]["standard error"], recorded["alone"]["standard error"])
        notes.append(f"{how}: {100 * more:+.1f} points of overhead more than in one process, ± {100 * error:.1f}")
    return checks, notes


def main() -> None:
    chosen = report.parser((__doc__ or "").splitlines()[0]).parse_args()
    rounds, steps = chosen.seeds or (1 if chosen.quick else 4), 8 if chosen.quick else 33
    found: dict[str, list[dict[str, dict[str, list[float]]]]] = {how: [] for how in PROCESSES}
    for _ in range(rounds):
        for how, measured in found.items():
            with tempfile.TemporaryDirectory() as folder:
                measured.append(measure(how, steps, Path(folder)))
    rows = [row for how, measured in found.items() for row in rows_of(how, measured)]
    checks, notes = checks_of(rows)
    report.publish("distributed_overhead", rows, checks, notes=notes, quick=chosen.quick)


if __name__ == "__main__":
    main()
