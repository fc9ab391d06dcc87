"""Tables in a terminal, and the one optional plotting dependency."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from typing import Any

from trainer_attrib.errors import MissingExtraError


def aligned(columns: Sequence[str], rows: Sequence[Sequence[str]], notes: Sequence[str] = ()) -> str:
    """A table as text; the last column is cut to the terminal's width."""
    one_line = [[" ".join(cell.split()) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in [list(columns), *one_line]) for i in range(len(columns) - 1)]
    width = shutil.get_terminal_size((120, 24)).columns
    lines = [_line(row, widths, width) for row in [list(columns), *one_line]]
    return "\n".join([lines[0], "-" * min(width, max(map(len, lines))), *lines[1:], *(f"note: {n}" for n in notes)])


def require_matplotlib() -> Any:
    """``matplotlib.pyplot``.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        import matplotlib.pyplot as pyplot
    except ImportError:
        raise MissingExtraError("matplotlib", "plot") from None
    return pyplot


def _line(row: Sequence[str], widths: Sequence[int], width: int) -> str:
    return "  ".join([*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[-1]])[:width].rstrip()
