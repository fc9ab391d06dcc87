"""Recording makes processes speak to each other at the documented moments only (decisions 0008 and 0013)."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.processes.train_counting import STEPS

HERE = Path(__file__).parent
FOLDED_IN, SNAPSHOT = (4, 12), 7
"""Steps after which second moments are folded in, and after which the stage's inner snapshot is taken."""


@pytest.fixture(scope="module")
def calls(launch: Callable, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, list[int]]]:
    folder = tmp_path_factory.mktemp("counting")
    launch(HERE / "train_counting.py", folder / "ledger", folder / "calls.json", processes=2)
    return json.loads((folder / "calls.json").read_text())


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_no_step_makes_a_call_of_its_own(how: str, calls: dict[str, dict[str, list[int]]]) -> None:
    plain, recorded = calls[how]["plain"], calls[how]["recorded"]
    assert len(plain) == len(recorded) == STEPS + 2
    assert all(count > 0 for count in plain[1:-1]), "the training's own calls are counted"
    assert plain[0] == plain[-1] == 0
    more = {step: recorded[step] - plain[step] for step in range(1, STEPS + 1) if recorded[step] != plain[step]}
    evidence = {1: 1}
    assert more.get(SNAPSHOT, 0) <= 12, "two for each of: hashes of moments and buffers, files of three kinds"
    rare = dict.fromkeys(FOLDED_IN, 1) | {SNAPSHOT: more.get(SNAPSHOT, 0)} if how == "fsdp" else {}
    assert more == evidence | rare
    assert recorded[0] > 0
    assert recorded[-1] > 0
