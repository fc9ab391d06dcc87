"""What a page is made of. Results describe themselves in these blocks; :mod:`report.page` draws them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Notes:
    """A list of sentences."""

    title: str
    lines: Sequence[str]


@dataclass(frozen=True)
class Grid:
    """A table. Numbers are aligned and shortened, everything else is shown as it is."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[object]]
    note: str = ""


@dataclass(frozen=True)
class Bar:
    """One bar: the group it stands in, what it is, how long it is and how uncertain."""

    group: str
    series: str
    value: float
    error: float = 0.0
    certain: bool = True


@dataclass(frozen=True)
class Bars:
    """Grouped horizontal bars with error bars around a common zero."""

    title: str
    bars: Sequence[Bar]
    unit: str = ""
    note: str = ""


@dataclass(frozen=True)
class Curve:
    """A line over steps."""

    name: str
    x: Sequence[float]
    y: Sequence[float]


@dataclass(frozen=True)
class Curves:
    """Small multiples: one frame per curve, side by side."""

    title: str
    curves: Sequence[Curve]
    note: str = ""


@dataclass(frozen=True)
class Example:
    """A ranked training example; ``tokens`` are the pieces of its text with their scores, if they are known,
    ``step`` 0 is an unknown one."""

    score: float
    name: str
    stage: str
    step: int
    source: str
    text: str
    tokens: Sequence[tuple[str, float]] = ()


@dataclass(frozen=True)
class Ranking:
    """For one query, the examples that promoted the behavior and those that opposed it."""

    query: str
    top: Sequence[Example]
    bottom: Sequence[Example]


@dataclass(frozen=True)
class Rankings:
    """Rankings of several queries."""

    title: str
    rankings: Sequence[Ranking]
    note: str = ""


Block = Notes | Grid | Bars | Curves | Rankings


def plain(block: Block) -> dict[str, Any]:
    """A block as JSON-ready data, ``block`` its kind."""
    return {"block": type(block).__name__.lower(), **asdict(block)}
