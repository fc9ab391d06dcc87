"""Rows of given examples at a snapshot of a stage, stored beside the rows that training left."""

from __future__ import annotations

import io
from collections.abc import Collection, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from trainer_attrib.errors import ConfigurationError, StageNotFoundError
from trainer_attrib.ledger.claims import Claim
from trainer_attrib.ledger.reader import RowBlock, RowPart, StageReader
from trainer_attrib.ledger.row_codecs import RowCodec
from trainer_attrib.ledger.schema import EXAMPLES, ROWS, check_format
from trainer_attrib.ledger.stage_tables import some_of
from trainer_attrib.ledger.stored_rows import StoredRows
from trainer_attrib.ledger.tables import corrupt, read_table


class PassFiles:
    """One pass: a folder ``stages/STAGE/passes/SNAPSHOT`` with ``pass.json`` and the parts that it lists.

    A part's files are written before the part is listed, so a pass that broke off is one of fewer examples, and goes on
    there.
    """

    def __init__(self, stage: StageReader, snapshot: str) -> None:
        stage.snapshot_step(snapshot)  # refuses what is not recorded
        self.stage, self.snapshot = stage, snapshot
        self._storage, self._folder = stage.storage, f"stages/{stage.name}/passes/{snapshot}"

    @property
    def meta(self) -> dict[str, Any]:
        """``pass.json``; empty before the pass began."""
        name = f"{self._folder}/pass.json"
        if not self._storage.exists(name):
            return {}
        found = self._storage.read_json(name)
        check_format(found, self._storage.path(name))
        return found

    @property
    def rows(self) -> int:
        """How many examples have their rows."""
        return sum(part["rows"] for part in self.meta.get("parts", []))

    def begin(self, data: str, version: int, dtype: str, examples: pa.Table) -> None:
        """Say what the rows are of, or check that it is the same as when the pass began.

        Args:
            data: fingerprint of the examples and their order.
            version: of the second moments that scale the rows.
            dtype: of the rows, see :class:`types.SketchConfig`.
            examples: with the columns of the ledger's examples.

        Raises:
            ConfigurationError: the pass was begun over other examples.
            StageExistsError: another process is making it.
        """
        self._storage.create_folder(self._folder)
        self._claim = Claim(self._storage, self._folder)  # kept as long as this object
        if known := self.meta:
            if known["data"] != data:
                raise ConfigurationError(
                    f"The pass of stage '{self.stage.name}' at '{self.snapshot}' was begun over other examples "
                    f"({known['examples']}) than are given now ({examples.num_rows}).",
                    cause="texts, ids or their order changed since.",
                    fix=f"pass the same examples, or remove {self._storage.path(self._folder)}.",
                )
            return
        sealed = self._storage.write(f"{self._folder}/examples.parquet", _parquet(examples))
        head = {"format": self.stage.codec(dtype).format, "data": data, "version": version, "dtype": dtype}
        head |= {"examples": examples.num_rows}
        self._storage.write_json(f"{self._folder}/pass.json", {**head, "sealed": sealed, "parts": []})

    def add(self, table: pa.Table, sketches: np.ndarray) -> None:
        """Store the rows of some more examples, [N, width] of unit norm."""
        meta = self.meta
        name, raw = f"part-{len(meta['parts']):06d}", self._codec.encode(sketches).tobytes()
        files = {
            f"{name}.parquet": self._storage.write(f"{self._folder}/{name}.parquet", _parquet(table.cast(ROWS))),
            f"{name}.raw": self._storage.write(f"{self._folder}/{name}.raw", raw),
        }
        meta["parts"].append({"rows": table.num_rows, "files": files})
        self._storage.write_json(f"{self._folder}/pass.json", meta)

    def examples(self) -> pa.Table:
        """All examples of the pass."""
        meta = self.meta
        return read_table(self._storage, f"{self._folder}/examples.parquet", meta["sealed"], EXAMPLES, meta["examples"])

    def parts(self) -> list[RowPart]:
        """Where the rows are, part by part."""
        return [RowPart({**part, "number": n}, self.snapshot) for n, part in enumerate(self.meta.get("parts", []))]

    def block(self, part: RowPart) -> RowBlock:
        """The rows of one part.

        Raises:
            CorruptPartError: a file does not have the length, or a table not the checksum, that was sealed.
        """
        number, files, rows = part.entry["number"], part.entry["files"], part.entry["rows"]
        table, raw = (f"part-{number:06d}.{suffix}" for suffix in ("parquet", "raw"))
        path, record = f"{self._folder}/{raw}", self._codec.record
        size = self._storage.size(path)
        if table not in files or raw not in files or size != files[raw]["bytes"]:
            raise corrupt(self._storage, path, f"it has {size} bytes, which is not what was sealed")
        if size != rows * record.itemsize:
            raise corrupt(self._storage, path, f"its length does not fit {rows} rows of {record.itemsize} bytes")
        told = read_table(self._storage, f"{self._folder}/{table}", files[table], ROWS, rows)
        return RowBlock(told, StoredRows(self._storage.records(path, record, rows), self._codec))

    @cached_property
    def _codec(self) -> RowCodec:
        return self.stage.codec(self.meta["dtype"])


class PassReader(StageReader):
    """A stage whose rows are those of finished passes at some of its snapshots, instead of those of training.

    Raises:
        StageNotFoundError: a snapshot has no finished pass.
    """

    def __init__(self, stage: StageReader, snapshots: Sequence[str]) -> None:
        super().__init__(stage.storage, stage.name)
        self.snapshots = (*snapshots,)
        self._made = [PassFiles(stage, snapshot) for snapshot in snapshots]
        for made in self._made:
            if not made.meta or made.rows < made.meta["examples"]:
                raise StageNotFoundError(
                    f"Stage '{stage.name}' has no finished pass at '{made.snapshot}': rows of {made.rows} examples.",
                    cause="it was not made, or broke off.",
                    fix="make it, or go on with it, by analyzer.sketch(data, snapshots) or `trainer-attrib sketch`.",
                )
        whole = {"sample": 1.0, "every_n_steps": 1, "dtype": self._made[0].meta["dtype"]}
        self.meta = {**self.meta, "sketch": {**self.meta["sketch"], **whole}}

    def visited_once(self, parts: Collection[RowPart]) -> bool:
        """False: an example has a row at every snapshot."""
        return False

    def row_parts(self) -> list[RowPart]:
        """Rows of every example, once for each snapshot; their step is the snapshot's."""
        return [part for made in self._made for part in made.parts()]

    def row_block(self, part: RowPart, columns: Collection[str] | None = None) -> RowBlock:
        """The rows of one part of one pass; see :meth:`StageReader.row_block`. All columns are there."""
        return next(made for made in self._made if made.snapshot == part.snapshot).block(part)

    def examples(self, columns: Sequence[str] = ("example", "source", "text")) -> pa.Table:
        """Every example once; its text may be left out."""
        found = pa.concat_tables([made.examples().select(list(columns)) for made in self._made])
        first = np.unique(found["example"].to_numpy(zero_copy_only=False), return_index=True)[1]
        return found.take(np.sort(first))

    def example_parts(self) -> list[Any]:
        """See :meth:`StageReader.example_parts`: one for each snapshot."""
        return list(range(len(self._made)))

    def examples_of(self, ids: frozenset[str] | None, part: Any) -> pa.Table:
        """Example, source and text of some examples."""
        return some_of(self._made[part].examples().cast(EXAMPLES), ids)


def _parquet(table: pa.Table) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink)
    return sink.getvalue()
