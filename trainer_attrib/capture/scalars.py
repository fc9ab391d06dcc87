"""How a recording is doing, as numbers for the tracker that the training reports to."""

from __future__ import annotations

from typing import Any

from trainer_attrib.ledger.writer import StageWriter

PREFIX = "trainer_attrib/"


def scalars_of(writer: StageWriter, meta: dict[str, Any], overhead: float | None) -> dict[str, float]:
    """Names -> numbers; what is not known (yet) has no entry. Waits neither for the device nor for the disk.

    The writer's thread may be some steps behind the training: rows, bytes and loss are of the steps it has taken in.

    - ``rows`` and ``bytes``: of this process's part of the stage so far, on disk or about to be.
    - ``overhead``: capture's share of the training's own time.
    - ``loss_of_covered``: mean loss of the steps that have rows, since the last call.
    - ``coverage``: share of the trainable parameters that rows cover.
    """
    rows, size, loss = writer.so_far()
    known: dict[str, float | None] = {
        "rows": rows,
        "bytes": size,
        "overhead": overhead,
        "loss_of_covered": loss,
        "coverage": (meta.get("coverage") or {}).get("share"),
    }
    return {PREFIX + name: float(value) for name, value in known.items() if value is not None}
