"""Tables in a terminal, and the one optional plotting dependency."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from typing import Any

from trainer_attrib.errors import MissingExtraError


def aligned(columns: Sequence[str], rows: Sequence[Sequence[str]], notes: Sequence[str] = ()) -> str:
    """A table as text, its last column cut to the terminal's width; without column names it has no head."""
    one_line = [[" ".join(cell.split()) for cell in row] for row in rows]
    cells = [list(columns), *one_line] if columns else one_line
    if not cells:
        return ""
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]) - 1)]
    width = shutil.get_terminal_size((120, 24)).columns
    lines = [_line(row, widths, width) for row in cells]
    head = [lines.pop(0), "-" * min(width, max(map(len, lines), default=0))] if columns else []
    return "\n".join([*head, *lines, *(f"note: {note}" for note in notes)])


def shortened(text: str, most: int = 100) -> str:
    """A text in one line of at most so many characters."""
    text = " ".join(text.split())
    return text if len(text) <= most else text[: most - 1] + "…"


def cut(text: str, most: int = 20_000) -> str:
    """A text as it is, without what is beyond so many characters."""
    return text if len(text) <= most else f"{text[:most]}… ({len(text) - most:,} more characters)"


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
