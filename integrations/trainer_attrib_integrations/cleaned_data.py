"""A cleaned data set on disk, in the format of Hugging Face ``datasets``, with the list of what was dropped."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trainer_attrib.errors import ConfigurationError, MissingExtraError

try:
    import datasets
except ImportError as error:
    raise MissingExtraError("datasets", "demo") from error

DROPPED = "dropped.jsonl"


def write_cleaned(folder: str | os.PathLike[str], kept: Any, dropped: Sequence[Mapping[str, Any]]) -> Path:
    """Write kept rows as :func:`write_rows` does, and one JSON line for each dropped one; returns the folder.

    Args:
        folder: new.
        kept: the rows.
        dropped: JSON-ready.

    Raises:
        ConfigurationError: see :func:`write_rows`.
    """
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in dropped]
    return write_rows(folder, kept, {DROPPED: "".join(lines)})


def write_rows(folder: str | os.PathLike[str], rows: Any, beside_them: Mapping[str, str] | None = None) -> Path:
    """Write rows for ``datasets.load_from_disk``, and files beside them; returns the folder.

    Everything is written beside the folder and moved there at once, so that whoever sees it sees all of it.

    Args:
        folder: new.
        rows: a ``datasets.Dataset``, or dicts, of which those that lack a column have None there.
        beside_them: name of a file -> its text.

    Raises:
        ConfigurationError: there is something at its place, it cannot be written, or rows have no common types.
    """
    place = Path(folder).absolute()
    refuse_existing(place)
    stored = rows if isinstance(rows, datasets.Dataset) else _of_rows(rows)
    beside = None
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(prefix=f".{place.name}.", dir=place.parent))
        stored.save_to_disk(beside / "data")
        for name, text in (beside_them or {}).items():
            (beside / "data" / name).write_text(text, encoding="utf-8")
        refuse_existing(place)
        os.rename(beside / "data", place)
    except OSError as error:
        raise ConfigurationError(
            f"Cannot write {place}: {error.strerror or error}.", fix="choose a folder that can be made."
        ) from error
    finally:
        if beside is not None:
            shutil.rmtree(beside, ignore_errors=True)
    return place


def refuse_existing(folder: str | os.PathLike[str]) -> None:
    """Nothing is ever written over.

    Raises:
        ConfigurationError: there is something at this place.
    """
    if os.path.lexists(folder):
        raise ConfigurationError(
            f"{folder} exists already.", fix="name a folder that does not exist, or move this one away."
        )


def _of_rows(rows: Sequence[Mapping[str, Any]]) -> datasets.Dataset:
    columns = {name: None for row in rows for name in row}
    try:
        return datasets.Dataset.from_dict({name: [row.get(name) for row in rows] for name in columns})
    except (TypeError, ValueError) as error:  # pyarrow's errors are of these
        raise ConfigurationError(
            f"The rows cannot be stored as columns {list(columns)}: {str(error).splitlines()[0]}",
            cause="a column holds values of different types.",
            fix="give a column one type in all rows.",
        ) from error
