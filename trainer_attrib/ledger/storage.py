"""Files under one root, local or any fsspec URL: atomic writes, checked reads."""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import math
import os
import tempfile
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
from fsspec.implementations.local import LocalFileSystem

from trainer_attrib.errors import LedgerError, LedgerFormatError, LedgerNotFoundError, LedgerNotWritableError
from trainer_attrib.ledger.documents import Document, check
from trainer_attrib.ledger.ranges import RangedRecords, Records

MOST_JSON = 1 << 28
"""Bytes that a JSON file may have; Python's objects take some ten times as much."""


class Storage:
    """A directory or object-store prefix. Relative names use ``/``."""

    def __init__(self, url: str | os.PathLike[str]) -> None:
        self.url = os.fspath(url)
        self._fs, self._root = fsspec.core.url_to_fs(self.url, use_listings_cache=False)  # others write here too
        self.local = isinstance(self._fs, LocalFileSystem)

    def path(self, name: str) -> str:
        """Full path of a relative name, as the file system wants it.

        Raises:
            LedgerFormatError: a symbolic link inside the ledger leads out of it.
        """
        path = f"{self._root.rstrip('/')}/{name}" if name else self._root
        if self.local and name and not self._is_within(name, path):
            raise LedgerFormatError(
                f"{path} leads out of the ledger, to {os.path.realpath(path)}.",
                cause="a symbolic link; in a ledger from elsewhere it could point to any file of yours.",
                fix="copy the ledger with its links resolved (cp -rL), or link the ledger's folder as a whole.",
            )
        return path

    def _is_within(self, name: str, path: str) -> bool:
        """Whether a path stays below the root: nothing on the way is a link, or all links lead to below it."""
        steps = name.split("/")
        below = itertools.accumulate(steps, "{}/{}".format, initial=self._root.rstrip("/"))
        if ".." not in steps and not any(os.path.islink(part) for part in itertools.islice(below, 1, None)):
            return True
        return os.path.realpath(path).startswith(os.path.realpath(self._root).rstrip(os.sep) + os.sep)

    def exists(self, name: str) -> bool:
        """Whether the file or folder is there."""
        path = self.path(name)
        return os.path.exists(path) if self.local else bool(self._fs.exists(path))

    def size(self, name: str) -> int:
        """Bytes of a file; 0 if it is missing."""
        path = self.path(name)
        try:
            return os.stat(path).st_size if self.local else int(self._fs.info(path)["size"] or 0)
        except FileNotFoundError:
            return 0

    def names(self, folder: str) -> list[str]:
        """Sorted base names inside a folder; empty if it does not exist."""
        if not self.exists(folder):
            return []
        self._fs.invalidate_cache()
        found = (str(entry).rstrip("/").rsplit("/", 1)[-1] for entry in self._fs.ls(self.path(folder), detail=False))
        return sorted(name for name in found if not name.startswith("."))

    def read(self, name: str) -> bytes:
        """All bytes of a file.

        Raises:
            LedgerNotFoundError: there is no such file.
        """
        path = self.path(name)
        try:
            if not self.local:
                return self._fs.cat_file(path)
            if not os.path.isfile(path):  # a pipe or a device would never end
                raise FileNotFoundError
            with open(path, "rb") as file:
                return file.read()
        except FileNotFoundError:
            raise LedgerNotFoundError(
                f"{path} does not exist.", fix="run `trainer-attrib verify` to see what else is missing."
            ) from None

    def read_json(self, name: str) -> dict[str, Any]:
        """A JSON object.

        Raises:
            LedgerFormatError: it is not JSON, not an object, or not what a file of this name holds.
        """
        if self.size(name) > MOST_JSON:
            raise LedgerFormatError(f"{self.path(name)} has {self.size(name):,} bytes, more than {MOST_JSON:,}.")
        try:
            kept = functools.partial(Document, where=self.path(name))
            data = json.loads(self.read(name), parse_constant=_refuse_constant, object_hook=kept)
        except (ValueError, RecursionError) as error:
            raise LedgerFormatError(
                f"{self.path(name)} is not valid JSON: {error}.",
                cause="it was edited or damaged; this library writes it atomically.",
                fix="restore the file from a backup.",
            ) from None
        if not isinstance(data, Document):
            raise LedgerFormatError(f"{self.path(name)} holds {type(data).__name__}, expected a JSON object.")
        check(name, data)
        return data

    def records(self, name: str, record: np.dtype[Any], count: int) -> Records:
        """So many records of a file, memory-mapped where it is local; elsewhere those that are indexed are fetched.

        The map is private: torch wants arrays that can be written to, and what is written never reaches the file.
        """
        if self.local:
            return np.memmap(self.path(name), record, mode="c") if count else np.empty(0, record)
        return RangedRecords(self._fs, self.path(name), record, count)

    def create_folder(self, name: str) -> bool:
        """Make a folder; False if it was there already. Of several that try at the same time one succeeds: on a local
        disk, and on object stores that create files conditionally, as S3 does (fsspec's ``mode="create"``). On others
        the one that wrote last does, and one that was much earlier may not notice.

        Raises:
            LedgerNotWritableError: it cannot be made.
        """
        with self.writing(name):
            if not self.local:
                return not self.exists(name) and self._created(f"{name}/.claim", uuid.uuid4().hex.encode())
            Path(self.path(name)).parent.mkdir(parents=True, exist_ok=True)
            try:
                os.mkdir(self.path(name))
            except FileExistsError:
                return False
            return True

    def create_json(self, name: str, data: dict[str, Any]) -> bool:
        """Write a JSON object where there is no file of this name; False if there is one. What :meth:`create_folder`
        says of several at the same time holds here too.

        Raises:
            LedgerNotWritableError: it cannot be written.
        """
        content = _json(data)
        if self.exists(name):
            return False
        if not self.local:
            with self.writing(name):
                return self._created(name, content)
        with self.writing(name), self._temporary(name) as temporary:
            temporary.write_bytes(content)
            return self._publish(temporary, name, _put_new)

    def _created(self, name: str, content: bytes) -> bool:
        path = self.path(name)
        try:
            self._fs.pipe_file(path, content, mode="create")
        except OSError:  # of s3fs it is not FileExistsError
            if self.exists(name):
                return False
            raise
        return self._fs.cat_file(path) == content  # a store that does not know the mode has the last one's

    def check_writable(self) -> None:
        """Write and remove a file.

        Raises:
            LedgerNotWritableError: it cannot be done.
        """
        probe = f".probe-{uuid.uuid4().hex}"  # another process of the same training may be checking too
        with self.replacing(probe) as path:
            path.write_bytes(b"")
        self._fs.rm_file(self.path(probe))

    def write(self, name: str, data: bytes) -> dict[str, Any]:
        """Write a file atomically; returns its manifest entry."""
        with self.replacing(name) as path:
            path.write_bytes(data)
        return {"bytes": len(data), "blake2b": digest(data)}

    def write_json(self, name: str, data: dict[str, Any]) -> None:
        """Write a JSON object atomically."""
        self.write(name, _json(data))

    def remove(self, name: str) -> None:
        """Remove a file; nothing if it is not there."""
        if self.exists(name):
            self._fs.rm_file(self.path(name))

    @contextmanager
    def replacing(self, name: str) -> Iterator[Path]:
        """A temporary path whose content replaces ``name`` as a whole, durably, when the block ends without an error.

        Raises:
            LedgerNotWritableError: the place cannot be written.
        """
        with self.writing(name), self._temporary(name) as temporary:
            yield temporary
            self._publish(temporary, name, os.replace)

    @contextmanager
    def _temporary(self, name: str) -> Iterator[Path]:
        """An empty file on the disk of the one of this name, if that is on a disk; gone when the block ends."""
        folder = Path(self.path(name)).parent if self.local else Path(tempfile.gettempdir())
        folder.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=".writing-", dir=folder)
        os.close(handle)
        try:
            yield Path(temporary)
        finally:
            Path(temporary).unlink(missing_ok=True)

    def _publish(self, temporary: Path, name: str, put: Callable[[Path, str], None]) -> bool:
        """Give a whole file its name, durably; False if ``put`` found the name taken."""
        if not self.local:
            self._fs.put_file(str(temporary), self.path(name))
            return True
        os.chmod(temporary, 0o644)
        _sync(str(temporary))
        try:
            put(temporary, self.path(name))
        except FileExistsError:
            return False
        _sync(str(temporary.parent))
        return True

    @contextmanager
    def writing(self, name: str) -> Iterator[None]:
        """What the system says of a place that cannot be written, in this library's words.

        Raises:
            LedgerNotWritableError: the block raised an ``OSError``.
        """
        try:
            yield
        except LedgerError:
            raise
        except OSError as error:
            raise LedgerNotWritableError(
                f"Cannot write {self.path(name)}: {error.strerror or error}.",
                cause="the directory is read-only, a file stands in its place, or the disk is full.",
                fix="choose another ledger directory, or make room or change permissions; what was sealed is intact.",
            ) from None


def _put_new(temporary: Path, path: str) -> None:
    """Give a file a free name too; raises FileExistsError where it is taken."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise
    except OSError:  # a disk without hard links cannot do it conditionally
        os.replace(temporary, path)


def _json(data: dict[str, Any]) -> bytes:
    return json.dumps(data, indent=1, allow_nan=False).encode()


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number")


def digest(data: bytes) -> str:
    """Checksum used in manifests."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def file_digest(path: Path) -> str:
    """Checksum of a file of any size."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def _sync(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def json_ready(value: Any) -> Any:
    """The same with null for what JSON has no words for: NaN and infinity."""
    if isinstance(value, Mapping):
        return {str(key): json_ready(inner) for key, inner in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [json_ready(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
