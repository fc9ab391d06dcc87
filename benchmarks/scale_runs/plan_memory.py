"""Bytes per example that the plan of visits takes: what a scan holds where examples may be in several parts.

The same scan as in ``scale.py``, by a reader that is not told that every example was visited once. Peak memory of a
process of its own at two numbers of rows; the difference over that of the rows is printed. With LEDGER, one such scan.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from memory import peak
from retrieval import question, recorded
from scale import KEEP, grown
from torch import nn

from trainer_attrib import Ledger
from trainer_attrib.analysis.influence import influence
from trainer_attrib.ledger.reader import StageReader

ROWS, QUERIES = (100_000, 400_000), 16


class Untold(StageReader):
    """Does not know that every example was visited once."""

    def visited_once(self, parts: object) -> bool:
        """Not known."""
        return False


def scanned(ledger: Path) -> int:
    """Peak memory of this process after a scan."""
    torch.set_num_threads(1)
    told = Ledger(ledger).stage("one")
    model, stage = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Tanh()), Untold(told.storage, told.name)
    influence(question(model, stage, QUERIES, keep=KEEP), "grad_cos")
    return peak()


def main() -> None:
    if len(sys.argv) > 1:
        print(json.dumps(scanned(Path(sys.argv[1]))))
        return
    peaks = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "ledger"
        recorded(folder, "float16", 512)
        for rows in ROWS:
            grown(folder, rows)
            done = subprocess.run([sys.executable, __file__, str(folder)], capture_output=True, text=True, check=True)
            peaks.append(int(done.stdout.splitlines()[-1]))
    print(f"{(peaks[1] - peaks[0]) / (ROWS[1] - ROWS[0]):.0f} bytes per example; peaks {peaks} at {ROWS} rows")


if __name__ == "__main__":
    main()
