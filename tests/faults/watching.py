"""Several processes at one ledger: readers of a stage that is being recorded, and analyzers that ask at once.

    python -m tests.faults.watching

prints as JSON what each of them saw. It forks, and is run as a process of its own, without threads.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from tests.analysis.stages import margins
from tests.faults import killing, work
from trainer_attrib import Analyzer, Ledger
from trainer_attrib.errors import StageExistsError
from trainer_attrib.ledger.passes import PassFiles


def together(jobs: list[Callable[[], Any]]) -> list[Any]:
    """Do all of them at once, each in a process of its own; returns what they return."""
    reading, children = [], []
    for job in jobs:
        ours, theirs = os.pipe()
        if (child := os.fork()) == 0:
            killing.leave(partial(_tell, job, theirs))
        os.close(theirs)
        reading.append(ours)
        children.append(child)
    told = []
    for pipe, child in zip(reading, children, strict=True):
        with os.fdopen(pipe, "rb") as lines:
            told.append(json.loads(lines.read()))
        os.waitpid(child, 0)
    return told


def _tell(job: Callable[[], Any], pipe: int) -> None:
    with os.fdopen(pipe, "wb") as out:
        out.write(json.dumps(job()).encode())


def watch(place: Path) -> list[dict[str, int]]:
    """Read the second stage again and again until it is complete."""
    seen: list[dict[str, int]] = []
    while True:
        ledger = Ledger(place / "ledger")
        if "second" in [stage.name for stage in ledger.stages()]:
            stage = ledger.stage("second")
            steps = Counter(step for block in stage.rows() for step in block.table["step"].to_pylist())
            told = {*stage.steps()["step"].to_pylist()}
            seen.append({
                "rows": steps.total(), "torn": sum(count != work.BATCH for count in steps.values()),
                "untold": len(steps.keys() - told), "problems": len(stage.problems()),
            })  # fmt: skip
            if stage.meta["status"] == "complete":
                return seen


def record(place: Path) -> None:
    """A part for every step."""
    with work.acknowledged(place / "notes", roll_bytes=1):
        work.train(place)


def ask(place: Path) -> list[list[float]]:
    """Influence of the second stage's rows."""
    found = Analyzer(place / "ledger", work.end_of_second(place)).influence([margins()], stages=["second"])
    return found.scores.tolist()


def sketch(place: Path) -> str:
    """Make a pass that somebody else may be making."""
    try:
        work.sketch_pass(place)
    except StageExistsError as error:
        return error.what
    return "made"


def main() -> None:
    """Print what everybody saw."""
    logging.disable(logging.WARNING)
    place = Path(tempfile.mkdtemp())
    killing.import_what_it_imports(partial(work.train, place, "first"))
    _, *watched = together([partial(record, place), partial(watch, place), partial(watch, place)])
    killing.import_what_it_imports(partial(ask, place))
    asked = together([partial(ask, place)] * 3)
    passes = together([partial(sketch, place)] * 3)
    stage = Ledger(place / "ledger").stage("second")
    made = PassFiles(stage, "end")
    ids = [example for part in made.parts() for example in made.block(part).table["example"].to_pylist()]
    print(json.dumps({"watched": watched, "asked": asked, "passes": passes, "ids": ids, "problems": stage.problems()}))


if __name__ == "__main__":
    main()
