"""Some trials of ``python -m tests.faults.kill_trials``, in a process of its own that forks and has no threads."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

from tests.faults.kill_trials import COLUMNS
from tests.faults.killing import Extent

ROOT = Path(__file__).parents[2]


def test_nothing_is_lost_corrupt_or_doubled() -> None:
    command = [sys.executable, "-m", "tests.faults.kill_trials", "--trials", "5", "--seed", "7", "--quiet"]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    header, *rows = [line for line in ran.stdout.splitlines() if not line.startswith("seed")]
    assert tuple(header.split()[1:]) == COLUMNS
    assert [row.split()[-5:] for row in rows] == [["1", "1", "0", "0", "0"]] * 5 + [["5", "5", "0", "0", "0"]]


def test_moments_are_those_of_the_seed() -> None:
    first, again, other = (
        [str(Extent(2.0, 100).moment(random.Random(seed * 100 + n))) for n in range(20)] for seed in (0, 0, 1)
    )
    assert first == again != other
    assert {moment.split()[0] == "operation" for moment in first} == {True, False}
