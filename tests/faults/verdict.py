"""What a killed process left: does the ledger open, and is every acknowledged row there once, as it was?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.faults.work import BATCH, STEPS
from trainer_attrib import Ledger
from trainer_attrib.ledger.passes import PassFiles
from trainer_attrib.ledger.reader import StageReader

ALL_ROWS = {f"{step}/{row}" for step in range(1, STEPS + 1) for row in range(BATCH)}


def rows_of(stage: StageReader) -> Iterator[tuple[str, list[Any]]]:
    """Id and content of every row: the step whose second moments scaled it, and its bits."""
    scaled = {entry["version"]: entry["after_step"] for entry in stage.meta["versions"]} | {0: 0}
    for block in stage.rows():
        columns = (block.table[name].to_pylist() for name in ("example", "version", "norm"))
        for example, version, norm, sketch in zip(*columns, block.sketches, strict=True):
            yield example, [scaled[version], norm, sketch.tobytes().hex()]


def differs(found: list[Any], expected: list[Any]) -> bool:
    """Whether a row is another. A stage that is resumed takes second moments at once, the unbroken one some steps
    later: rows between are scaled by others, as they say, and cannot be compared."""
    return found[0] == expected[0] and found != expected


def reference(place: Path) -> dict[str, list[Any]]:
    """The rows of the second stage of a run that nothing killed, by id."""
    return dict(rows_of(Ledger(place / "ledger").stage("second")))


def look(place: Path, stage: str, expected: dict[str, list[Any]], owed: set[str]) -> dict[str, int]:
    """Count what is wrong with a ledger whose process was killed.

    Args:
        place: where the ledger is.
        stage: that was being recorded.
        expected: the rows of a run that nothing killed.
        owed: the ids of acknowledged rows.
    """
    ledger = Ledger(place / "ledger")
    first, problems = ledger.stage("first"), [p for s in ledger.stages() for p in s.problems()]
    if first.meta["status"] != "complete" or first.count("rows") != STEPS * BATCH:
        problems.append("the stage before it has changed")
    recorded = stage in [reader.name for reader in ledger.stages()]
    found = list(rows_of(ledger.stage(stage))) if recorded else []
    times = Counter(example for example, _ in found)
    return {
        "opened": 1,
        "lost": sum(1 for example in owed if example not in times),
        "corrupt": len(problems) + sum(differs(content, expected[example]) for example, content in found),
        "doubled": sum(count - 1 for count in times.values()),
    }


def look_at_whole(place: Path, stage: str, expected: dict[str, list[Any]]) -> dict[str, int]:
    """The same of a stage that was gone on with to its end: it must have every row, and nothing left lying about."""
    found = look(place, stage, expected, ALL_ROWS)
    found["corrupt"] += Ledger(place / "ledger").stage(stage).meta["status"] != "complete"
    found["corrupt"] += len(leftovers(place / "ledger" / "stages" / stage))
    return found


def look_at_pass(place: Path, owed: set[str], *, finished: bool) -> dict[str, int]:
    """The same of a pass over data, whose parts are acknowledged as they are listed."""
    stage: StageReader = Ledger(place / "ledger").stage("second")
    made = PassFiles(stage, "end")
    ids = [example for part in made.parts() for example in made.block(part).table["example"].to_pylist()]
    missing = len(owed) - len(made.parts())
    lost = (made.meta["examples"] - len({*ids})) if finished else max(0, missing)
    left = len(leftovers(place / "ledger")) if finished else 0
    return {"opened": 1, "lost": lost, "corrupt": len(stage.problems()) + left, "doubled": len(ids) - len({*ids})}


def leftovers(folder: Path) -> list[str]:
    """Temporary files that nothing uses any more."""
    return [str(path) for path in folder.rglob(".*") if path.name.startswith((".writing-", ".probe-"))]
