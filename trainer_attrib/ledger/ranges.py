"""Records of a file on an object store: only ranges of bytes that are asked for are fetched."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from fsspec import AbstractFileSystem

from trainer_attrib.errors import CorruptPartError, LedgerNotFoundError

GAP_BYTES = 64 << 10  # between two ranges: less of it is read through, for a request costs more


class Records(Protocol):
    """Records of a part [N]: an array, or what is read when it is indexed."""

    def __len__(self) -> int: ...

    def __getitem__(self, key: Any, /) -> Any:
        """Records of a slice or of indices."""
        ...


class RangedRecords:
    """An array of records as far as indexing goes; every index is one call to the store.

    Args:
        files: the store.
        path: of the file, as the store wants it.
        record: of one row.
        count: how many there are.
    """

    def __init__(self, files: AbstractFileSystem, path: str, record: np.dtype[Any], count: int) -> None:
        self._files, self._path, self._record, self._count = files, path, record, count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, key: Any) -> np.ndarray:
        """Records of a slice or of indices, fetched now.

        Raises:
            LedgerNotFoundError: the file is gone.
            CorruptPartError: it ends before the records do.
        """
        at = np.arange(self._count)[key]
        wanted, back = np.unique(at, return_inverse=True)
        gaps = np.flatnonzero(np.diff(wanted) > 1 + GAP_BYTES // self._record.itemsize) + 1
        runs = [run for run in np.split(wanted, gaps) if len(run)]
        found = [records[run - run[0]] for run, records in zip(runs, self._fetched(runs), strict=True)]
        return np.concatenate(found)[back] if found else np.zeros(0, self._record)

    def _fetched(self, runs: list[np.ndarray]) -> list[np.ndarray]:
        size = self._record.itemsize
        starts, ends = ([int(run[edge]) * size for run in runs] for edge in (0, -1))
        ends = [end + size for end in ends]
        try:
            found = self._files.cat_ranges([self._path] * len(runs), starts, ends, on_error="raise")
        except FileNotFoundError:
            raise LedgerNotFoundError(f"{self._path} does not exist.", fix="run `trainer-attrib verify`.") from None
        if short := [end for data, start, end in zip(found, starts, ends, strict=True) if len(data) != end - start]:
            raise CorruptPartError(
                f"{self._path} ends before byte {short[0]}.",
                cause="the file was truncated or changed after it was sealed.",
                fix="run `trainer-attrib verify` for the whole list, then restore this file.",
            )
        return [np.frombuffer(bytearray(data), self._record) for data in found]
