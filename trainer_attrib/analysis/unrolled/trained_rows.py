"""Which examples were in which row of which micro-batch of a stage, as its ledger tells."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from trainer_attrib.errors import NotComparableError
from trainer_attrib.ledger.reader import StageReader
from trainer_attrib.types import Layout

Place = tuple[int, int]
"""Step and micro-batch, both counted from 0."""


@dataclass(frozen=True)
class TrainedRows:
    """The examples of a stage and where they were.

    Args:
        ids: of the examples, N.
        last_step: in which each took part, counted from 1, [N].
        visits: how often each did, [N].
        at: for every micro-batch, which example was in each row of the model's outputs, an index into ``ids``.
    """

    ids: list[str]
    last_step: np.ndarray
    visits: np.ndarray
    at: Mapping[Place, np.ndarray]

    @property
    def sizes(self) -> dict[Place, int]:
        """Rows of each micro-batch's outputs."""
        return {place: len(examples) for place, examples in self.at.items()}

    @staticmethod
    def of(stage: StageReader) -> TrainedRows:
        """Read from the stage's rows.

        Raises:
            NotComparableError: it does not have all of them, or its rows are documents of packed rows.
        """
        names, step, micro = recorded_visits(stage, "example", "step", "micro_batch")
        ids, index = np.unique(names.astype(str), return_inverse=True)
        last_step = np.zeros(len(ids), np.int64)
        np.maximum.at(last_step, index, step)
        places = np.stack([step - 1, micro], axis=1)
        begins = np.flatnonzero(np.any(places[1:] != places[:-1], axis=1)) + 1
        sides = Layout(stage.meta.get("layout", Layout.ROWS)).sides
        at = {
            (int(places[part[0], 0]), int(places[part[0], 1])): np.tile(index[part], sides)
            for part in np.split(np.arange(len(index)), begins)
        }
        return TrainedRows(ids.tolist(), last_step, np.bincount(index, minlength=len(ids)), at)


def recorded_visits(stage: StageReader, *columns: str) -> list[np.ndarray]:
    """Columns of the rows table of every visit of an example, in the order of training.

    Raises:
        NotComparableError: the stage does not have all of them, or its rows are documents of packed rows.
    """
    _check_recorded(stage)
    tables = [block.table for block in stage.rows()]
    step, micro, row, *found = (
        np.concatenate([table[name].to_numpy(zero_copy_only=False) for table in tables])
        for name in ("step", "micro_batch", "row", *columns)
    )
    order = np.lexsort((row, micro, step))
    return [column[order] for column in found]


def _check_recorded(stage: StageReader) -> None:
    sketch, steps = stage.meta["sketch"], stage.steps()
    rows = steps["rows"].to_numpy()
    reasons = {
        "only a sample of the examples has rows": sketch.get("sample", 1) < 1,
        "only one step in several has rows": sketch.get("every_n_steps", 1) > 1,
        "it was trained by several processes": stage.meta["processes"] > 1,
        "its examples are documents of packed rows": stage.meta.get("layout") == Layout.SEGMENTS,
        "some steps have no rows": not len(rows) or bool((rows == 0).any()),
    }
    for reason, holds in reasons.items():
        if holds:
            raise NotComparableError(
                f"It is not known which examples each step of stage '{stage.name}' was trained on: {reason}.",
                cause="to run its steps again, or to differentiate them, takes every example of every step.",
                fix="record the stage with SketchConfig(sample=1, every_n_steps=1), one example per row, in one "
                "process; or use another recipe.",
            )
