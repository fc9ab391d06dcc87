"""Fuzzes the reader with atheris, guided by coverage; not part of the tests. Ends at the first error that is not ours.

    pip install -c constraints.txt atheris
    python -m tests.faults.fuzz_reader -max_total_time=300

Every input changes one file of a small ledger, seals it anew or not, and reads everything.
"""

from __future__ import annotations

import logging
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import atheris  # pyright: ignore[reportMissingImports] (an optional tool)

with atheris.instrument_imports(include=["trainer_attrib.ledger", "json", "pyarrow"]):
    from tests.faults import hostile
    from trainer_attrib.errors import TrainerAttribError

REPLACED = (b"null", b"-1", b"1e9", b"4294967296", b'"../x"', b"[]", b"{}", b"true", b'"O"', b"9" * 30)


def mutated(content: bytes, data: Any) -> bytes:
    """Some bytes overwritten, removed, or replaced by what JSON has words for."""
    found = bytearray(content)
    for _ in range(data.ConsumeIntInRange(1, 6)):
        at = data.ConsumeIntInRange(0, max(0, len(found) - 1))
        kind = data.ConsumeIntInRange(0, 3)
        if kind == 0 and found:
            found[at] = data.ConsumeIntInRange(0, 255)
        elif kind == 1:
            del found[at : at + data.ConsumeIntInRange(1, 40)]
        elif kind == 2:
            found[at:at] = data.ConsumeBytes(data.ConsumeIntInRange(1, 12))
        else:
            found = _value_replaced(found, at, REPLACED[data.ConsumeIntInRange(0, len(REPLACED) - 1)])
    return bytes(found)


def _value_replaced(found: bytearray, at: int, value: bytes) -> bytearray:
    """The first value after a place in JSON, up to the comma or bracket after it, replaced."""
    start = found.find(b": ", at) + 2
    ends = [end for end in (found.find(mark, start) for mark in (b",", b"}", b"\n")) if end >= 0]
    return found[:start] + value + found[min(ends) :] if start > 1 and ends else found


def main() -> None:
    """Run until time is over or something is found."""
    logging.disable(logging.CRITICAL)
    place = Path(tempfile.mkdtemp())
    hostile.make(place)
    names = hostile.files(place)

    def read(given: bytes) -> None:
        data = atheris.FuzzedDataProvider(given)
        name = names[data.ConsumeIntInRange(0, len(names) - 1)]
        sealed = data.ConsumeBool()
        content = mutated((place / name).read_bytes(), data)
        with hostile.changed(place, name, content, sealed=sealed), suppress(TrainerAttribError):
            hostile.read_everything(place)

    atheris.Setup(sys.argv, read)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
