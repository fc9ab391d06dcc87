"""A ledger is read while a stage of it is being recorded, and by several analyzers at once."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.faults.verdict import ALL_ROWS

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def seen() -> dict[str, Any]:
    """What the processes of :mod:`tests.faults.watching` saw."""
    ran = subprocess.run([sys.executable, "-m", "tests.faults.watching"], capture_output=True, text=True, cwd=ROOT)
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout)


def test_readers_of_a_stage_being_recorded_see_sealed_parts_only(seen: dict[str, Any]) -> None:
    for watched in seen["watched"]:
        rows = [look["rows"] for look in watched]
        assert rows == sorted(rows)
        assert rows[-1] == len(ALL_ROWS)
        assert len({*rows}) > 2, "nothing was seen of the stage before it was complete"
        assert {(look["torn"], look["untold"], look["problems"]) for look in watched} == {(0, 0, 0)}


def test_analyzers_that_ask_at_once_get_the_same_answer(seen: dict[str, Any]) -> None:
    first, *others = seen["asked"]
    assert len(first) == 7
    assert others == [first, first]


def test_a_pass_that_is_asked_for_by_several_is_made_once(seen: dict[str, Any]) -> None:
    made = [said for said in seen["passes"] if said == "made"]
    assert made
    assert all("Another process is writing to" in said for said in seen["passes"] if said != "made")
    assert sorted(seen["ids"]) == sorted(f"second/{row}" for row in range(24))
    assert seen["problems"] == []
