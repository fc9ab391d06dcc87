"""The rows of a stage as one Lance table, for those who want indexes on an object store. The ledger stays as it is.

Records are those of the ledger, byte by byte, so that scores from the table are the same to the bit. Which format they
have, and everything else that is known of the stage, stays in the ledger.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa

from trainer_attrib.errors import LedgerNotFoundError, MissingExtraError
from trainer_attrib.ledger.reader import RowBlock, RowPart, StageReader
from trainer_attrib.ledger.schema import ROWS
from trainer_attrib.ledger.stored_rows import StoredRows

INDEXED = ("example", "step", "source")
ROWS_PER_FILE = 1 << 30  # a part of the ledger becomes one fragment of the table


def export_lance(stage: StageReader, url: str) -> None:
    """Write all rows of a stage that count, with the source of each, as a new table with scalar indexes.

    Args:
        stage: to be read.
        url: of the table, which is replaced if there is one; any that Lance takes.

    Raises:
        MissingExtraError: Lance is not installed.
    """
    lance, sources, codec = _lance(), stage.sources(), stage.codec(stage.meta["sketch"]["dtype"])
    schema = pa.schema([*ROWS, ("source", pa.string()), ("record", pa.binary(codec.record.itemsize))])
    lance.write_dataset(schema.empty_table(), url, schema=schema, mode="overwrite")
    for block in stage.rows():
        data = pa.py_buffer(block.sketches.records().tobytes())
        records = pa.FixedSizeBinaryArray.from_buffers(schema.field("record").type, len(block.sketches), [None, data])
        found = [sources.get(example) for example in block.table["example"].to_pylist()]
        columns = [*block.table.cast(ROWS).columns, pa.array(found, pa.string()), records]
        part = pa.Table.from_arrays(columns, schema=schema)
        lance.write_dataset(part, url, mode="append", max_rows_per_file=ROWS_PER_FILE)
    table = lance.dataset(url)
    for column in INDEXED if table.count_rows() else ():
        table.create_scalar_index(column, "BTREE")


class LanceReader(StageReader):
    """A stage whose rows are those of a table that :func:`export_lance` wrote.

    Args:
        stage: of the ledger.
        url: of the table.

    Raises:
        MissingExtraError: Lance is not installed.
        LedgerNotFoundError: there is no such table.
    """

    def __init__(self, stage: StageReader, url: str) -> None:
        super().__init__(stage.storage, stage.name)
        self._url = url
        _ = self._fragments

    @cached_property
    def _fragments(self) -> list[Any]:
        lance = _lance()
        try:
            return lance.dataset(self._url).get_fragments()
        except ValueError as error:
            raise LedgerNotFoundError(f"No Lance table at {self._url}.", cause=str(error)[:200]) from None

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_fragments"}  # opened again elsewhere

    def visited_once(self, parts: Collection[RowPart]) -> bool:
        """False: which examples a fragment tells of is not known."""
        return False

    def row_parts(self) -> list[RowPart]:
        """The table's fragments."""
        return [RowPart({"fragment": n, "rows": f.count_rows()}) for n, f in enumerate(self._fragments)]

    def row_block(self, part: RowPart, columns: Collection[str] | None = None) -> RowBlock:
        """The rows of one fragment."""
        fragment, codec = self._fragments[part.entry["fragment"]], self.codec(self.meta["sketch"]["dtype"])
        records = LanceRecords(fragment, codec.record, part.entry["rows"])
        return RowBlock(fragment.to_table(columns=ROWS.names).cast(ROWS), StoredRows(records, codec))


@dataclass(frozen=True)
class LanceTables:
    """Tables that :func:`export_lance` wrote, as the source of an analyzer's rows: ``influence(..., source=this)``.

    Args:
        urls: of tables, by the names of their stages; other stages are read from their ledger.
    """

    urls: Mapping[str, str]

    def reader(self, stage: StageReader) -> StageReader:
        """Of a stage.

        Raises:
            MissingExtraError: Lance is not installed.
            LedgerNotFoundError: there is no such table.
        """
        return LanceReader(stage, self.urls[stage.name]) if stage.name in self.urls else stage


class LanceRecords:
    """Records of a fragment, see :class:`ranges.RangedRecords`."""

    def __init__(self, fragment: Any, record: np.dtype[Any], count: int) -> None:
        self._fragment, self._record, self._count = fragment, record, count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, key: Any) -> np.ndarray:
        """Records of a slice or of indices, read now."""
        wanted, back = np.unique(np.arange(self._count)[key], return_inverse=True)
        if not len(wanted):
            return np.zeros(0, self._record)
        found = self._fragment.take(wanted.tolist(), columns=["record"])["record"].to_pylist()
        return np.frombuffer(bytearray(b"".join(found)), self._record)[back]


def _lance() -> Any:
    try:
        import lance
    except ImportError:
        raise MissingExtraError("lance", "lance") from None
    return lance
