"""A file in each of a Trainer's checkpoints that says which stage was being recorded, and up to which step."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from trainer_attrib.ledger.resuming import belongs

NAME = "trainer_attrib.json"


def note(folder: Path, entry: dict[str, Any]) -> None:
    """Add what ``Recorder.checkpoint()`` returned; the callbacks of a trainer share the file."""
    others = [other for other in _entries(folder) if other["began"] != entry["began"]]
    temporary = folder / f"{NAME}.tmp"
    temporary.write_text(json.dumps({"stages": [*others, entry]}, indent=1))
    os.replace(temporary, folder / NAME)


def noted_for(folder: Path, ledger: Any) -> dict[str, Any]:
    """The entry that is a stage of this ledger, else any, which the error will name; {} if there is none."""
    entries = _entries(folder)
    return next((entry for entry in entries if belongs(ledger, entry)), entries[0] if entries else {})


def _entries(folder: Path) -> list[dict[str, Any]]:
    try:
        return json.loads((folder / NAME).read_text())["stages"]
    except FileNotFoundError:
        return []
