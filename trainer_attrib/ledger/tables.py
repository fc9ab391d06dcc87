"""Tables from files that may have been made elsewhere: nothing is parsed or allocated before it was compared."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from trainer_attrib.errors import CorruptPartError
from trainer_attrib.ledger.storage import Storage, digest

MOST_UNPACKED = 64 << 20
"""Bytes that any table may take unpacked; a larger file may take a hundred times its own."""

MOST_STEPS = 1 << 28
NEVER_NULL = frozenset({"example", "step", "norm", "complete"})


def read_table(
    storage: Storage,
    name: str,
    entry: Mapping[str, Any] | None,
    schema: pa.Schema | None,
    rows: int | None = None,
    columns: Collection[str] | None = None,
) -> pa.Table:
    """A Parquet file of a ledger.

    Args:
        storage: the ledger.
        name: of the file.
        entry: length and checksum with which it was sealed; None where there are none.
        schema: columns that it must have, of these types; None for any.
        rows: how many it must have, if that is known.
        columns: of the schema, the only ones that are read; None: all.

    Raises:
        LedgerNotFoundError: there is no such file.
        CorruptPartError: it is not what was sealed, or not such a table.
    """
    if entry is not None and storage.size(name) != entry["bytes"] and storage.exists(name):
        raise corrupt(storage, name, f"it has {storage.size(name)} bytes, {entry['bytes']} were sealed")
    data = storage.read(name)
    if entry is not None and digest(data) != entry["blake2b"]:
        raise corrupt(storage, name, "it has another checksum than when it was sealed")
    try:
        table = _parsed(data, rows, columns)
    except (pa.ArrowException, OSError, MemoryError, ValueError, OverflowError) as error:
        raise corrupt(storage, name, f"Parquet says: {str(error)[:200]}") from None
    for field in schema or ():
        if columns is not None and field.name not in columns:
            continue
        if table.schema.get_field_index(field.name) < 0:
            raise corrupt(storage, name, f"it has no column '{field.name}', or several")
        column = table.column(field.name)
        if column.type != field.type:
            raise corrupt(storage, name, f"its column '{field.name}' is {column.type}, expected {field.type}")
        if field.name in NEVER_NULL and column.null_count:
            raise corrupt(storage, name, f"its column '{field.name}' has nulls")
        if field.name == "step" and not _are_steps(column.to_numpy()):
            raise corrupt(storage, name, f"its steps are not from 0 to {MOST_STEPS:,}")
    return table


def corrupt(storage: Storage, name: str, why: str) -> CorruptPartError:
    """The error for a file that is not what its manifest says."""
    return CorruptPartError(
        f"{storage.path(name)} is corrupt: {why}.",
        cause="the file was truncated or changed after it was sealed.",
        fix="run `trainer-attrib verify` for the whole list, then restore this file; other parts are intact.",
    )


def _are_steps(numbers: np.ndarray) -> bool:
    """Readers make arrays as long as the largest."""
    return not len(numbers) or bool(0 <= numbers.min() <= numbers.max() <= MOST_STEPS)


def _parsed(data: bytes, rows: int | None, columns: Collection[str] | None) -> pa.Table:
    """The table, if what it says of itself is what is known of it."""
    file = pq.ParquetFile(pa.BufferReader(data), pre_buffer=False)  # it is in memory
    about = file.metadata
    if rows is not None and about.num_rows != rows:
        raise ValueError(f"{about.num_rows} rows, expected {rows}")
    unpacked = sum(about.row_group(number).total_byte_size for number in range(about.num_row_groups))
    if not 0 <= unpacked <= MOST_UNPACKED + 100 * len(data) or about.num_rows > MOST_UNPACKED:
        raise ValueError(f"{unpacked} bytes and {about.num_rows} rows would be unpacked from {len(data)} bytes")
    known = None if columns is None else [name for name in file.schema_arrow.names if name in columns]
    table = file.read(known, use_threads=False)  # of some hundred kilobytes
    table.validate(full=True)
    return table
