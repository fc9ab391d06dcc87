"""Reading a ledger: the tree of stages, and streams over their sealed parts."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from trainer_attrib.errors import LedgerFormatError, LedgerNotFoundError, StageNotFoundError
from trainer_attrib.ledger.row_codecs import RowCodec, row_codec
from trainer_attrib.ledger.schema import (
    WEIGHTS,
    check_format,
    part_files,
    pass_part,
)
from trainer_attrib.ledger.stage_tables import StageTables
from trainer_attrib.ledger.storage import Storage, digest
from trainer_attrib.ledger.stored_rows import StoredRows


@dataclass(frozen=True)
class RowBlock:
    """Example rows of one part: their table and unit-norm sketches [N, width], row i of one is row i of the other."""

    table: pa.Table
    sketches: StoredRows


@dataclass(frozen=True)
class RowPart:
    """Where some rows are: what the manifest lists of a sealed part, and of a pass at which snapshot they were made."""

    entry: dict[str, Any]
    snapshot: str = ""


class StageReader(StageTables):
    """One recorded stage. Only sealed parts are seen, so a stage can be read while it is being recorded."""

    @property
    def parent(self) -> str | None:
        """Name of the stage that this one continued, found by its starting weights."""
        return self.meta["parent"]

    def weights_at(self, when: str) -> dict[str, dict[str, Any]]:
        """Shape and hash of every weight at the ``"start"`` or ``"end"``, or of those that merging the adapters of the
        end would change (``"merged"``, with sampled values). Empty where that was not recorded."""
        path = f"{self._folder}/{WEIGHTS}"
        if not self._storage.exists(path):
            return {}
        found = self._storage.read_json(path)
        check_format(found, self._storage.path(path))
        return found.get(when, {})

    @property
    def adapters(self) -> set[str]:
        """Names of the weights that belong to adapters, not to the bare model."""
        return set(self.meta.get("adapters", ()))

    @property
    def low_rank_updates(self) -> list[dict[str, Any]]:
        """What LoRA adds to which weight: ``weight += scaling * B @ A``, or its transpose; entries name the weights."""
        return self.meta.get("low_rank_updates", [])

    @property
    def width(self) -> int:
        """Numbers per example row."""
        return int(self.meta["width"])

    def codec(self, dtype: str) -> RowCodec:
        """How rows of this stage lie on disk.

        Args:
            dtype: that of ``SketchConfig``.

        Raises:
            LedgerFormatError: ``stage.json`` says what cannot be.
        """
        codec = row_codec(dtype, self.meta.get("row_blocks") or [[1, 1, self.width]])
        if codec.width != self.width:
            raise LedgerFormatError(
                f"Stage '{self.name}' has rows of {self.width} numbers, and matrices of {codec.width} in them.",
                cause="stage.json was edited or damaged.",
                fix="restore it from a backup.",
            )
        return codec

    def count(self, kind: str) -> int:
        """Number of sealed ``"rows"``, ``"steps"`` or ``"examples"`` that count."""
        if self.meta["processes"] > 1 and kind != "rows":
            return (self.examples() if kind == "examples" else self.steps()).num_rows
        if kind == "examples" or not self.meta["resumed"]:
            return sum(part[kind] for part in self.parts())
        return self.steps().num_rows if kind == "steps" else sum(block.table.num_rows for block in self.rows())

    @property
    def bytes(self) -> int:
        """Bytes of the sealed parts and of the snapshots stored in this stage."""
        return sum(entry["bytes"] for _, entry in self._sealed())

    def row_parts(self) -> list[RowPart]:
        """Where the stage's rows are, part by part: a part can be read by another process, which is given this."""
        return [RowPart(part) for part in self.parts() if part["rows"]]

    def row_block(self, part: RowPart, columns: Collection[str] | None = None) -> RowBlock:
        """The rows of one part; of their table only some columns, ``step`` among them, which is faster.

        Raises:
            CorruptPartError: a file does not have the length its manifest says.
        """
        entry, codec = part.entry, self.codec(self.meta["sketch"]["dtype"])
        described, raw = part_files(entry, "rows", 2)
        self._check_length(entry, raw)
        if entry["files"][raw]["bytes"] != entry["rows"] * codec.record.itemsize:
            raise self._corrupt(raw, f"its length does not fit {entry['rows']} rows of {codec.record.itemsize} bytes")
        table = self._table(entry, described, columns)
        records = self._storage.records(f"{self._folder}/{raw}", codec.record, entry["rows"])
        sketches = StoredRows(records, codec)
        if entry["until"] is not None:
            counts = np.flatnonzero(table["step"].to_numpy() <= entry["until"])
            table, sketches = table.take(counts), sketches.take(counts)
        return RowBlock(table, sketches)

    def visited_once(self, parts: Collection[RowPart]) -> bool:
        """Whether it is known, without reading any table, that no example has more than one row in some parts.

        A part tells of those examples whose first row is in it. Where it has as many rows, there are no others.

        Args:
            parts: all that :meth:`row_parts` listed at some time.
        """
        several = self.meta["processes"] > 1 or self.meta["resumed"]  # tell of some examples twice
        return not several and all(part.entry["rows"] == part.entry["examples"] for part in parts)

    def examples_in(self, part: RowPart, columns: Collection[str]) -> pa.Table:
        """The examples that one part tells of: those whose first row is in it."""
        return self._kind(part.entry, "examples", columns).select(list(columns))

    def rows(self) -> Iterator[RowBlock]:
        """Example rows, part by part.

        Raises:
            CorruptPartError: a file does not have the length its manifest says.
        """
        return map(self.row_block, self.row_parts())

    def problems(self) -> list[str]:
        """Everything wrong with the sealed files: lengths, checksums, missing snapshots. Empty means sound."""
        found = []
        for name, entry in self._sealed():
            path = f"{self._folder}/{name}"
            if not self._storage.exists(path):
                found.append(f"{self.name}: {name} is missing")
            elif self._storage.size(path) != entry["bytes"]:
                found.append(f"{self.name}: {name} has {self._storage.size(path)} bytes, sealed {entry['bytes']}")
            elif digest(self._storage.read(path)) != entry["blake2b"]:
                found.append(f"{self.name}: {name} has another checksum than when it was sealed")
        shared = [(what, path) for what, path, entry in self._tensor_files() if entry.get("stored_in")]
        return found + [f"{self.name}: {what} is missing" for what, path in shared if not self._storage.exists(path)]

    def _sealed(self) -> list[tuple[str, dict[str, Any]]]:
        """Every file that is stored in this stage, with its length and checksum."""
        parts = [file for part in self.parts() for file in part["files"].items()]
        own = [(path, entry) for _, path, entry in self._tensor_files() if not entry.get("stored_in")]
        return [*parts, *((path.removeprefix(f"{self._folder}/"), entry) for path, entry in own), *self._passes()]

    def _passes(self) -> Iterator[tuple[str, dict[str, Any]]]:
        for snapshot in self._storage.names(f"{self._folder}/passes"):
            if not self._storage.exists(f"{self._folder}/passes/{snapshot}/pass.json"):
                continue  # it died being begun
            found = self._storage.read_json(f"{self._folder}/passes/{snapshot}/pass.json")
            yield f"passes/{snapshot}/examples.parquet", found["sealed"]
            for part in found["parts"]:
                yield from ((f"passes/{snapshot}/{pass_part(name)}", entry) for name, entry in part["files"].items())


class Ledger:
    """The stages recorded under one directory or URL.

    Raises:
        LedgerNotFoundError: nothing is recorded there.
        LedgerFormatError: it was written by a newer version.
    """

    def __init__(self, url: str | os.PathLike[str]) -> None:
        self.storage = Storage(url)
        if not self.storage.exists("ledger.json"):
            raise LedgerNotFoundError(
                f"No ledger at {self.storage.url} (there is no ledger.json).",
                cause="the path is wrong, or no stage has been recorded there yet.",
                fix="pass the directory that was given to the callback.",
            )
        self.meta = self.storage.read_json("ledger.json")
        check_format(self.meta, self.storage.path("ledger.json"))

    def stage(self, name: str) -> StageReader:
        """One stage by name.

        Raises:
            StageNotFoundError: it was not recorded here.
        """
        if name not in self._names():
            raise StageNotFoundError(
                f"No stage '{name}' in {self.storage.url}; recorded are {self._names()}.",
                fix="use one of the recorded names.",
            )
        return StageReader(self.storage, name)

    def stages(self) -> list[StageReader]:
        """All stages, parents before children, then by the time they began."""
        found = {name: StageReader(self.storage, name) for name in self._names()}
        ordered = sorted(found.values(), key=lambda stage: (self._depth(stage, found), stage.meta["began"]))
        return ordered

    def _names(self) -> list[str]:
        names = self.storage.names("stages")
        return [name for name in names if self.storage.exists(f"stages/{name}/stage.json")]  # others died being opened

    def later_than_all(self) -> float:
        """Now, or just after the stage begun last: clocks are set back, and stages are told apart and ordered by it."""
        return max(time.time(), *(math.nextafter(stage.meta["began"], math.inf) for stage in self.stages()), 0.0)

    def ended(self) -> list[StageReader]:
        """The stages whose weights at the end are known."""
        return [stage for stage in self.stages() if stage.meta["weights"].get("end")]

    def lineage(self, weights: str | None = None) -> list[StageReader]:
        """Stages that led to the weights with this hash, first to last; without a hash, to the stage begun last.

        Raises:
            StageNotFoundError: no stage ended with these weights.
        """
        matches = [s for s in self.ended() if weights in (None, s.meta["weights"]["end"])]
        if not matches:
            raise no_stage_ended_with(self)
        return self.ancestry(max(matches, key=lambda s: s.meta["began"]).name)

    def ancestry(self, name: str) -> list[StageReader]:
        """The stages that led to a stage, first to last, itself included."""
        stages = {stage.name: stage for stage in self.stages()}
        chain = [stages[name]]
        while (parent := chain[-1].parent) is not None:
            chain.append(stages[parent])
        return chain[::-1]

    def _depth(self, stage: StageReader, stages: dict[str, StageReader]) -> int:
        depth, seen = 0, {stage.name}
        while stage.parent is not None:
            if stage.parent not in stages or stage.parent in seen:
                raise LedgerFormatError(
                    f"Stage '{stage.name}' names parent '{stage.parent}', which is missing or its own descendant.",
                    cause="a stage's folder was removed or edited by hand.",
                    fix="restore the folder of the parent stage.",
                )
            stage = stages[stage.parent]
            seen.add(stage.name)
            depth += 1
        return depth


def no_stage_ended_with(ledger: Ledger, reason: str = "") -> StageNotFoundError:
    """The error for weights that no stage ended with."""
    finished = [stage.name for stage in ledger.ended()]
    return StageNotFoundError(
        f"No stage of {ledger.storage.url} ended with these weights; finished stages: {finished}.",
        cause=reason or "the model was trained further, saved in another precision, or is not the recorded one.",
        fix="load the weights with which the last recorded stage ended.",
    )
