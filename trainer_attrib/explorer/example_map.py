"""The examples of a stage on a plane: their gradient sketches along the two directions in which they differ most."""

from __future__ import annotations

from typing import Any

import numpy as np

from trainer_attrib.ledger.reader import StageReader
from trainer_attrib.progress import progress

SAMPLE, GRID = 1000, 1023  # rows that the directions come from; places along either axis


def example_map(stage: StageReader) -> dict[str, Any]:
    """Positions of the examples in the order of :meth:`StageReader.examples`, whole numbers from 0 to 1023, None for
    those without a row; and the share of the sample's variance that the plane holds (Pearson 1901, "On lines and planes
    of closest fit").

    An example that was visited several times stands where its last row is.
    """
    mean, plane, share = _plane(stage)
    last: dict[str, np.ndarray] = {}
    for block in progress(stage.rows(), f"map of {stage.name}", len(stage.row_parts())):
        at = np.concatenate([(np.asarray(some, np.float32) - mean) @ plane for some in block.sketches.chunks()])
        last |= dict(zip(block.table["example"].to_pylist(), at, strict=True))
    names = stage.examples()["example"].to_pylist()
    known = np.array([last[name] for name in names if name in last]).reshape(-1, 2)
    low = known.min(0) if len(known) else np.zeros(2)
    span = np.maximum(known.max(0) - low, 1e-12) if len(known) else np.ones(2)
    points = [None if name not in last else np.rint((last[name] - low) / span * GRID).astype(int).tolist()
              for name in names]  # fmt: skip
    return {"stage": stage.name, "points": points, "variance_shown": share}


def _plane(stage: StageReader) -> tuple[np.ndarray, np.ndarray, float]:
    """Mean [W], two directions [W, 2], and their share of the variance, of a sample of rows."""
    total = stage.count("rows")
    every, seen, kept = max(1, total // SAMPLE), 0, []
    for block in stage.rows():
        chosen = np.arange(-seen % every, len(block.sketches), every)
        kept.append(np.asarray(block.sketches[chosen], np.float32))
        seen += len(block.sketches)
    sample = np.concatenate(kept) if kept else np.zeros((1, max(stage.width, 2)), np.float32)
    mean = sample.mean(0)
    values, left = np.linalg.eigh((sample - mean) @ (sample - mean).T)  # smaller than the rows are wide
    values, left = values[::-1].clip(0), left[:, ::-1]
    directions = (sample - mean).T @ left[:, :2]
    directions = directions / np.maximum(np.linalg.norm(directions, axis=0), 1e-12)
    if directions.shape[1] < 2:
        directions = np.pad(directions, ((0, 0), (0, 2 - directions.shape[1])))
    return mean, directions, float(values[:2].sum() / max(values.sum(), 1e-12))
