"""Blocks -> one HTML file that asks nobody for anything: no script, no font, no image from elsewhere."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from trainer_attrib.report.blocks import Bars, Block, Curves, Example, Grid, Notes, Ranking, Rankings
from trainer_attrib.report.charts import bars_svg, curve_svg, shown
from trainer_attrib.report.escape import escaped
from trainer_attrib.version import __version__

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"


def page(title: str, blocks: Sequence[Block], subtitle: str = "") -> str:
    """The whole page."""
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}"><title>{escaped(title)}</title>'
        f"<style>{_style()}</style></head><body><main><header><h1>{escaped(title)}</h1><p>{escaped(subtitle)}</p></header>"
        f"{fragment(blocks)}<footer>trainer-attrib {__version__}. This page is one file and loads nothing.</footer>"
        "</main></body></html>"
    )


def fragment(blocks: Sequence[Block]) -> str:
    """The blocks alone."""
    return "".join(_block(block) for block in blocks)


def embedded(blocks: Sequence[Block]) -> str:
    """The blocks with their style, for a notebook, whose own looks they must not change: the rules are nested in the
    class of the element around them."""
    rules = re.sub(r"(?<![-\w.])(:root|body|main) \{", "& {", _style())
    return f'<div class="trainer-attrib"><style>.trainer-attrib {{ {rules} }}</style>{fragment(blocks)}</div>'


def write_page(path: str | os.PathLike[str], title: str, blocks: Sequence[Block], subtitle: str = "") -> Path:
    """Write the page as a whole; an existing file is replaced only by a complete one."""
    return write_text(path, page(title, blocks, subtitle))


def write_text(path: str | os.PathLike[str], text: str) -> Path:
    """Write a file as a whole; an existing one is replaced only by a complete one."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=target.parent, suffix=".html")
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(text)
    os.chmod(temporary, 0o644)
    os.replace(temporary, target)
    return target


def _style() -> str:
    return resources.files("trainer_attrib.report").joinpath("page.css").read_text()


def _block(block: Block) -> str:
    match block:
        case Notes():
            inner = (
                "<ul>" + "".join(f"<li>{escaped(line)}</li>" for line in block.lines) + "</ul>" if block.lines else ""
            )
        case Grid():
            inner = _grid(block) + _note(block.note)
        case Bars():
            inner = bars_svg(block) + (f'<p class="unit">{escaped(block.unit)}</p>' if block.unit else "")
            inner += _note(block.note)
        case Curves():
            inner = f'<div class="curves">{"".join(curve_svg(c) for c in block.curves)}</div>' + _note(block.note)
        case Rankings():
            inner = _note(block.note) + "".join(_ranking(r, first=i == 0) for i, r in enumerate(block.rankings))
    return f"<section><h2>{escaped(block.title)}</h2>{inner}</section>" if inner else ""


def _grid(block: Grid) -> str:
    first = block.rows[0] if block.rows else [""] * len(block.columns)
    head = "".join(
        f"<th{' class=n' if _is_number(value) else ''}>{escaped(column)}</th>"
        for column, value in zip(block.columns, first, strict=True)
    )
    rows = "".join("<tr>" + "".join(_cell(value) for value in row) + "</tr>" for row in block.rows)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'


def _cell(value: object) -> str:
    return f'<td class="n">{shown(value)}</td>' if _is_number(value) else f"<td>{escaped(shown(value))}</td>"


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _ranking(ranking: Ranking, *, first: bool) -> str:
    sides = (("proponents", "made it more likely", ranking.top), ("opponents", "made it less likely", ranking.bottom))
    columns = "".join(
        f'<div class="{kind}"><h3>{kind} <small>{why}</small></h3><ol>{"".join(map(_example, examples))}</ol></div>'
        for kind, why, examples in sides
    )
    return (
        f"<details{' open' if first else ''}><summary>{escaped(ranking.query)}</summary>"
        f'<div class="sides">{columns}</div></details>'
    )


def _example(example: Example) -> str:
    place = f"{example.stage}, step {example.step}" if example.step else example.stage
    facts = " · ".join(filter(None, [example.name, example.source, place]))
    return (
        f'<li><b class="score">{example.score:+.3g}</b><p class="text">{_text(example)}</p>'
        f'<p class="facts">{escaped(facts)}</p></li>'
    )


def _text(example: Example) -> str:
    """The text, its tokens colored by their scores where these are known: the strongest of the example in full."""
    strongest = max((abs(score) for _, score in example.tokens), default=0.0)
    if not strongest:
        return escaped(example.text or "(no text)")
    return "".join(
        f'<span class="{"up" if score > 0 else "down"}" style="--w:{abs(score) / strongest:.2f}" '
        f'title="{score:+.3g}">{escaped(piece)}</span>'
        if score
        else escaped(piece)
        for piece, score in example.tokens
    )


def _note(note: str) -> str:
    return f'<p class="note">{escaped(note)}</p>' if note else ""
