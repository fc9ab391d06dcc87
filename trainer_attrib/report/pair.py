"""JSON lines for the viewer of PAIR's pretraining-tda: plain data -> file.

Its README lists the fields (Chang et al. 2024, "TrackStar"; github.com/PAIR-code/pretraining-tda). The viewer runs in
the browser, reads the file from disk and sends nothing.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


def write_pair(path: str | os.PathLike[str], records: Iterable[Mapping[str, Any]]) -> Path:
    """Write one record per line; an existing file is replaced only by a complete one.

    Args:
        path: of the file.
        records: one per query: ``example_id``, ``query_set``, ``inputs_plaintext``, ``targets_plaintext`` ("" if it is
            left out), ``proponents`` (texts), ``proponent_ids``, ``proponent_scores``, the same of ``opponents``, and
            perhaps ``proponent_correct``. A score that is not finite is refused: JSON has none.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=target.parent, suffix=".jsonl")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            for record in records:
                filled = {"targets_plaintext": "", **record}
                file.write(json.dumps(filled, ensure_ascii=False, allow_nan=False) + "\n")
        os.chmod(temporary, 0o644)
        os.replace(temporary, target)
    finally:
        Path(temporary).unlink(missing_ok=True)
    return target
