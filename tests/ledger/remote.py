"""A store with real requests: memory, but every one of them is counted, and takes its time."""

from __future__ import annotations

import time
from typing import Any, ClassVar

import fsspec
from fsspec.implementations.memory import MemoryFileSystem


class CountedStore(MemoryFileSystem):
    """``counted://``: what was fetched of which file, in order."""

    protocol = "counted"
    fetched: ClassVar[list[tuple[str, int, int]]] = []  # path, first byte, bytes
    latency: ClassVar[float] = 0.0

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **kwargs: Any) -> bytes:
        time.sleep(self.latency)
        data = super().cat_file(path, start, end, **kwargs)
        self.fetched.append((path, start or 0, len(data)))
        return data

    @classmethod
    def of_rows(cls) -> list[tuple[str, int, int]]:
        """What was fetched of rows' bytes."""
        return [request for request in cls.fetched if "/rows/" in request[0] and not request[0].endswith(".parquet")]


class ForgetfulStore(CountedStore):
    """``forgetful://``: it does not know how to create conditionally, and says nothing."""

    protocol = "forgetful"

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **kwargs: Any) -> None:
        super().pipe_file(path, value)


for store in (CountedStore, ForgetfulStore):
    fsspec.register_implementation(store.protocol, store, clobber=True)
