"""All examples of a ledger as one table, and which of them meet conditions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute

from trainer_attrib.analysis.tables import cut
from trainer_attrib.errors import ConfigurationError
from trainer_attrib.ledger.reader import Ledger, StageReader

pc: Any = pyarrow.compute  # whose functions are made when it is imported, unseen by type checkers
COLUMNS = ("stage", "example", "step", "source", "text")


@dataclass(frozen=True)
class Conditions:
    """What examples must meet, all of it; None is no condition.

    Args:
        stage: name.
        source: name; "" are examples without one.
        first: optimizer step.
        last: optimizer step, included.
        text: anywhere in the example, whatever the case.
    """

    stage: str | None = None
    source: str | None = None
    first: int | None = None
    last: int | None = None
    text: str | None = None

    @staticmethod
    def of(asked: Mapping[str, str]) -> Conditions:
        """From a page's address.

        Raises:
            ConfigurationError: a step that is no whole number.
        """
        found: dict[str, Any] = {name: asked[name] for name in ("stage", "source") if name in asked}
        found |= {"text": asked["text"]} if asked.get("text") else {}
        found |= {name: number(asked, name) for name in ("first", "last") if asked.get(name)}
        return Conditions(**found)


def number(asked: Mapping[str, str], name: str, default: int = 0, most: int = 2**53) -> int:
    """A whole number of a page's address, from 0 to ``most``.

    Raises:
        ConfigurationError: it is none.
    """
    text = asked.get(name, str(default))
    if not (text.isascii() and text.isdigit()) or len(text) > 16:
        raise ConfigurationError(f"{name}={text[:40]!r} is no whole number.", fix="correct the address.")
    return min(int(text), most)


class ExampleTable:
    """Every example of every stage: stage, example, step (the last that it took part in), source, text."""

    def __init__(self, ledger: Ledger) -> None:
        self.table = pa.concat_tables([_of_stage(stage) for stage in ledger.stages()] or [_EMPTY]).combine_chunks()

    def __len__(self) -> int:
        return self.table.num_rows

    @cached_property
    def places(self) -> dict[tuple[str, str], int]:
        """Number of each example by stage and id."""
        pairs = zip(self.table["stage"].to_pylist(), self.table["example"].to_pylist(), strict=True)
        return {pair: place for place, pair in enumerate(pairs)}

    def matching(self, wanted: Conditions) -> np.ndarray:
        """bool [N]."""
        table, conditions = self.table, []
        if wanted.stage is not None:
            conditions.append(pc.equal(table["stage"], wanted.stage))
        if wanted.source is not None:
            conditions.append(pc.equal(pc.fill_null(table["source"], ""), wanted.source))
        if wanted.first is not None:
            conditions.append(pc.greater_equal(table["step"], wanted.first))
        if wanted.last is not None:
            conditions.append(pc.less_equal(table["step"], wanted.last))
        if wanted.text is not None:
            conditions.append(pc.fill_null(pc.match_substring(table["text"], wanted.text, ignore_case=True), False))
        found = np.ones(len(self), bool)
        for condition in conditions:
            found &= condition.to_numpy()
        return found

    def page(self, wanted: Conditions, offset: int = 0, limit: int = 50) -> dict[str, Any]:
        """Some of the matching examples, and how many there are."""
        found = np.flatnonzero(self.matching(wanted))
        return {"examples": len(self), "matching": len(found), "offset": offset,
                "rows": self.rows(found[offset : offset + limit])}  # fmt: skip

    def rows(self, places: np.ndarray) -> list[dict[str, Any]]:
        """Examples by number, JSON-ready."""
        rows = self.table.take(pa.array(places, pa.int64())).to_pylist()
        return [row | {"text": cut(row["text"] or "")} for row in rows]

    def facets(self) -> dict[str, Any]:
        """What can be chosen: stages with their last step, sources with their counts."""
        stages = {}
        for name in pc.unique(self.table["stage"]).to_pylist():
            steps = self.table.filter(pc.equal(self.table["stage"], name))["step"]
            stages[name] = {"examples": len(steps), "last_step": pc.max(steps).as_py() or 0}
        counted = pc.value_counts(pc.fill_null(self.table["source"], "")).to_pylist()
        sources = {pair["values"]: pair["counts"] for pair in counted}
        return {"examples": len(self), "stages": stages, "sources": dict(sorted(sources.items()))}


def _of_stage(stage: StageReader) -> pa.Table:
    examples = stage.examples()
    last: dict[str, int] = {}
    for block in stage.rows():
        for example, step in zip(block.table["example"].to_pylist(), block.table["step"].to_pylist(), strict=True):
            last[example] = max(step, last.get(example, 0))
    steps = [last.get(example, 0) for example in examples["example"].to_pylist()]
    return pa.table({
        "stage": pa.array([stage.name] * examples.num_rows, pa.string()), "example": examples["example"],
        "step": pa.array(steps, pa.int64()), "source": examples["source"], "text": examples["text"],
    }, schema=_SCHEMA)  # fmt: skip


_SCHEMA = pa.schema([(name, pa.int64() if name == "step" else pa.string()) for name in COLUMNS])
_EMPTY = _SCHEMA.empty_table()
