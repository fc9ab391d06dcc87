"""Rows of a part: decoded when they are asked for, never all at once."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import numpy as np

from trainer_attrib.ledger.prefetch import ahead
from trainer_attrib.ledger.ranges import Records
from trainer_attrib.ledger.row_codecs import RowCodec

CHUNK = 256  # rows at a time, unless somebody knows better
READ_BYTES = 4 << 20  # of a remote part at a time; two such reads are held


class StoredRows:
    """Unit-norm rows [N, width], an array as far as reading goes: ``rows[3]``, ``rows[10:20]``, ``rows[indices]``,
    ``np.asarray(rows)``. Only what is indexed is read and decoded.

    Args:
        records: of all rows of the part, [M].
        codec: of the records.
        at: which of the records these are, [N]; None: all.
    """

    def __init__(self, records: Records, codec: RowCodec, at: np.ndarray | None = None) -> None:
        self._records, self._codec, self._at = records, codec, at

    def __len__(self) -> int:
        return len(self._records) if self._at is None else len(self._at)

    @property
    def shape(self) -> tuple[int, int]:
        """N and width."""
        return len(self), self._codec.width

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of decoded rows."""
        return self._codec.decode(np.zeros(0, self._codec.record)).dtype

    def __getitem__(self, key: Any) -> Any:
        """Decoded rows, or of them what further indices choose. A copy unless the bytes on disk are the numbers."""
        rows, *rest = key if isinstance(key, tuple) else (key,)
        if isinstance(rows, int | np.integer):
            return self[[rows]][(0, *rest)]
        found = self._codec.decode(self._read(rows))
        return found[(slice(None), *rest)] if rest else found

    def __iter__(self) -> Iterator[np.ndarray]:
        for chunk in self.chunks():
            yield from chunk

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self[:], dtype)

    def chunks(self, size: int = CHUNK) -> Iterator[np.ndarray]:
        """All rows in order, so many at a time. Of a remote part the next ones are fetched meanwhile."""
        remote = not isinstance(self._records, np.ndarray)
        together = max(1, READ_BYTES // (size * self._codec.record.itemsize)) if remote else 1
        spans = (slice(first, first + together * size) for first in range(0, len(self), together * size))
        reads = (functools.partial(self._read, span) for span in spans)
        for records in ahead(reads) if remote else (read() for read in reads):
            for first in range(0, len(records), size):
                yield self._codec.decode(records[first : first + size])

    def _read(self, rows: Any) -> np.ndarray:
        return self._records[rows if self._at is None else self._at[rows]]

    def records(self) -> np.ndarray:
        """What is on disk of these rows, [N]."""
        return self._read(slice(None))

    def take(self, at: np.ndarray) -> StoredRows:
        """Some of the rows, none of which is read yet.

        Args:
            at: their indices.
        """
        return StoredRows(self._records, self._codec, at if self._at is None else self._at[at])
