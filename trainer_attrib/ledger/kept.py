"""Answers that were kept beside the stages they are about, as plain data."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from trainer_attrib.errors import ConfigurationError, LedgerNotFoundError
from trainer_attrib.ledger.reader import StageReader
from trainer_attrib.ledger.schema import FORMAT, check_format
from trainer_attrib.ledger.storage import Storage, digest, json_ready
from trainer_attrib.ledger.tables import read_table

FOLDER = "answers"
_KEY = re.compile(r"[a-z0-9][a-z0-9-]{0,79}")


class Answers:
    """The folder ``answers/`` of a ledger: ``KEY.json`` and, where it has columns that are too long for JSON,
    ``KEY.parquet``. The table is written first: an answer that is listed is whole."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage

    def keep(
        self, title: str, parts: list[dict[str, Any]], asked: Mapping[str, Any] | None = None,
        scores: pa.Table | None = None,
    ) -> str:  # fmt: skip
        """Store an answer and return its key; one to the same question replaces the older.

        Args:
            title: for people.
            parts: JSON-ready; numbers that are not finite become null.
            asked: the question, JSON-ready, which the key is made of; without it, of the answer.
            scores: of all examples, for whoever filters them.
        """
        plain = json_ready(parts)
        key = key_of(asked if asked is not None else {"title": title, "parts": plain})
        if scores is not None:
            sink = io.BytesIO()
            pq.write_table(scores, sink, compression="zstd")
            self._storage.write(f"{FOLDER}/{key}.parquet", sink.getvalue())
        made = datetime.now(UTC).isoformat(timespec="seconds")
        told = {"format": FORMAT, "key": key, "title": title, "made": made, "asked": asked, "parts": plain}
        self._storage.write_json(f"{FOLDER}/{key}.json", told)
        return key

    def read(self, key: str) -> dict[str, Any]:
        """One answer.

        Raises:
            LedgerNotFoundError: there is none under this key.
            LedgerFormatError: of a newer version of this library, or damaged.
        """
        name = f"{FOLDER}/{checked(key)}.json"
        if not self._storage.exists(name):
            raise LedgerNotFoundError(f"No answer '{key}' is kept in {self._storage.url}.", fix=f"keys: {self.keys()}")
        found = self._storage.read_json(name)
        check_format(found, self._storage.path(name))
        return found

    def scores(self, key: str) -> pa.Table | None:
        """Scores of all examples, if the answer has them."""
        name = f"{FOLDER}/{checked(key)}.parquet"
        return read_table(self._storage, name, None, None) if self._storage.exists(name) else None

    def keys(self) -> list[str]:
        """Of all answers, sorted."""
        return [name.removesuffix(".json") for name in self._storage.names(FOLDER) if name.endswith(".json")]

    def has(self, key: str) -> bool:
        """Whether there is an answer."""
        return self._storage.exists(f"{FOLDER}/{checked(key)}.json")

    def listed(self) -> list[dict[str, Any]]:
        """Key, title, time and kinds of all answers, newest first."""
        found = [self.read(key) for key in self.keys()]
        heads = [
            {"key": a["key"], "title": a["title"], "made": a["made"], "kinds": [part["kind"] for part in a["parts"]]}
            for a in found
        ]
        return sorted(heads, key=lambda head: head["made"], reverse=True)


def state_of(stages: Iterable[StageReader]) -> str:
    """A fingerprint of what is recorded: answers to the same question about another state are others."""
    return key_of({stage.name: stage.part_counts() for stage in stages})


def key_of(asked: Mapping[str, Any]) -> str:
    """What a question's answer is kept under."""
    return digest(json.dumps(json_ready(asked), sort_keys=True).encode())[:20]


def checked(key: str) -> str:
    """A key that is one.

    Raises:
        ConfigurationError: it is something else, such as a path.
    """
    if not _KEY.fullmatch(key):
        raise ConfigurationError(f"{key!r} is no key of an answer.", fix="use one that `Answers.keys()` lists.")
    return key
