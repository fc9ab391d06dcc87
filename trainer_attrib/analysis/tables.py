"""Tables in a terminal, and the one optional plotting dependency."""

from __future__ import annotations

import shutil
import unicodedata
from collections.abc import Sequence
from typing import Any

from trainer_attrib.errors import MissingExtraError
from trainer_attrib.report.escape import visible


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


def in_figure(text: str, most: int = 60) -> str:
    """A text as a label of a figure: in one line, literally. Between two dollar signs matplotlib would read a formula,
    and fail where it is none; its own font has no sign for a control character."""
    shown = visible(shortened(text, most)).replace("␀", "�").replace("$", r"\$")
    return "".join("�" if unicodedata.category(character) == "Cc" else character for character in shown)


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


def bars_of(axis: Any, labels: Sequence[str], values: Sequence[float], errors: Sequence[float] | None = None) -> None:
    """Horizontal bars around zero on a matplotlib axis, the first at the bottom; those of one label stay apart."""
    axis.barh(range(len(values)), values, xerr=errors, height=0.7)
    axis.set_yticks(range(len(values)), [in_figure(label) for label in labels])
    axis.axvline(0, color="black", linewidth=0.8)


def _line(row: Sequence[str], widths: Sequence[int], width: int) -> str:
    return "  ".join([*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[-1]])[:width].rstrip()
