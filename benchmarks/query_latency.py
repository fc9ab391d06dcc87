"""What a question to recorded rows costs, beside the closest peer's answer to the same question over the same rows.

Both ends of 100 for 16 queries by cosine, over rows of 4096 float16 numbers. The first answer includes opening what is
on disk; the next ones are of the same process, in which the peer keeps all rows. Every process is a new one, and they
take turns; CPU time over that of multiplying the memory-mapped rows with the queries, a few megabytes at a time.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np
import report
from scale import WIDTH, grown

HERE = Path(__file__).parent
QUERIES, KEEP, TIMES = 16, 100, 4
MEMORY = "memory over the rows' bytes"


def asked(python: str | Path, script: str, *arguments: object) -> dict[str, Any]:
    """What a process says of itself."""
    command = [str(python), str(HERE / "scale_runs" / script), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{script}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def row(name: str, turns: list[dict[str, Any]], bare: list[float], rows: int) -> dict[str, Any]:
    """One line of the table, medians over turns."""
    first = median(turn["spent"][0] / one for turn, one in zip(turns, bare, strict=True))
    later = median(median(turn["spent"][1:]) / one for turn, one in zip(turns, bare, strict=True))
    return {
        "who": name, "first answer": first, "next answers": later,
        MEMORY: median(turn["grown"] for turn in turns) / (2 * WIDTH * rows),
        "bytes per row": turns[0]["bytes"] / rows,
    }  # fmt: skip


def same(ours: list[list[str]], theirs: list[list[int]]) -> float:
    """Which share of our best examples the peer names too."""
    named = [{f"example-{place}" for place in best} for best in theirs]
    return mean(len(set(one) & other) / len(one) for one, other in zip(ours, named, strict=True))


def main() -> None:
    options = report.parser_with_peer((__doc__ or "").splitlines()[0]).parse_args()
    rows, repeats = (4_096, 1) if options.quick else (65_536, options.seeds or 3)
    ours, theirs = [], []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "ledger"
        scan = HERE / "scale_runs" / "scan.py"
        subprocess.run([sys.executable, str(scan), str(folder), "0", "record", "serial", "0"], check=True)
        grown(folder, rows)
        for _ in range(repeats):
            ours.append(asked(sys.executable, "ask.py", folder, QUERIES, KEEP, TIMES))
            if Path(options.peer_python).exists():
                stage = folder / "stages" / "one"
                theirs.append(asked(options.peer_python, "ask_peer.py", stage, WIDTH, QUERIES, KEEP, TIMES))
    bare = [float(np.median(turn["bare"])) for turn in ours]
    bound = {"who": "bare products", "first answer": 1.0, "next answers": 1.0, MEMORY: 0.0, "bytes per row": 2 * WIDTH}
    found, notes, checks = [row("trainer-attrib", ours, bare, rows)], [], {}
    if theirs:
        found.append(row(theirs[0]["peer"], theirs, bare, rows))
        agree = same(ours[0]["best"], theirs[0]["best"])
        notes.append(f"of our {KEEP} best, the peer names {agree:.1%}")
        checks["first answer over the peer's"] = report.check(found[0]["first answer"] / found[1]["first answer"], 1.0)
        checks["memory over the peer's"] = report.check(found[0][MEMORY] / found[1][MEMORY], 1.0)
    else:
        print("peer skipped: not installed, see benchmarks/README.md")
    report.publish("query_latency", [bound, *found], checks, quick=options.quick, notes=notes)


if __name__ == "__main__":
    main()
