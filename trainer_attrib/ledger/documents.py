"""What the JSON files of a ledger must hold before anything of them is used: types, and numbers within bounds.

A ledger may come from elsewhere. Whatever a reader later allocates, multiplies or looks up is checked here once, so
that readers can take it as it is. Entries that are not named here are left to who knows them: writers may add some.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from trainer_attrib.errors import LedgerFormatError
from trainer_attrib.ledger.schema import NEWEST
from trainer_attrib.types import ROW_DTYPES


@dataclass(frozen=True)
class Whole:
    """An integer within bounds."""

    least: int
    most: int

    def __str__(self) -> str:
        return f"an integer from {self.least:,} to {self.most:,}"


@dataclass(frozen=True)
class Each:
    """An object of any names whose values are alike."""

    value: Any


@dataclass(frozen=True)
class Maybe:
    """Something that may be null or missing."""

    value: Any


@dataclass(frozen=True)
class OneOf:
    """One of some texts."""

    texts: tuple[str, ...]

    def __str__(self) -> str:
        return f"one of {list(self.texts)}"


COUNT, LENGTH, RANK = Whole(0, 1 << 53), Whole(1, 1 << 31), Whole(1, 1024)
WIDTH = Whole(1, 1 << 28)
FILE = {"bytes": COUNT, "blake2b": str}
BESIDE = {
    "stored_in": Maybe((str, str)), "bytes": Maybe(COUNT), "blake2b": Maybe(str), "shards": Maybe(Each(FILE)),
}  # fmt: skip
SNAPSHOT = {"name": str, "step": COUNT, **BESIDE}
WEIGHT = {
    "name": str, "bias": str, "bias_axis": Whole(0, 1), "modules": [str], "rows": LENGTH, "columns": LENGTH,
    "left": RANK, "right": RANK, "offset": COUNT,
}  # fmt: skip
PLAN = {
    "weights": [WEIGHT], "uncovered": Maybe(Each(str)), "rank": Maybe(RANK), "seed": Maybe(COUNT),
    "blocks": Maybe(LENGTH),
}  # fmt: skip
GROUP = {"parameters": [str], "settings": Each(object)}
CHANGES = ("added", "removed", "reshaped", "merged", "frozen")
SHADOW = {"of": str, "replica": COUNT}

STAGE = {
    "name": str, "status": OneOf(("recording", "complete", "incomplete")), "reason": str, "began": float,
    "ended": Maybe(float), "parent": Maybe(str), "weights": Each(Maybe(str)),
    "link": Maybe({"parent": Maybe(str), "kind": str, "reason": Maybe(str), **dict.fromkeys(CHANGES, Maybe([str]))}),
    "snapshots": [{**SNAPSHOT, **dict.fromkeys(("moments", "buffers", "optimizer"), Maybe(BESIDE))}],
    "versions": [{"version": Whole(1, 9999), "after_step": COUNT, **FILE}],
    "resumed": [{"after_step": COUNT, "parts": Each(COUNT), "processes": Maybe(COUNT), "lost": Maybe(str)}],
    "processes": Whole(1, 1 << 16), "sharded": bool, "plan": PLAN, "trainable": [str],
    "width": WIDTH, "row_blocks": Maybe([(LENGTH, LENGTH, LENGTH)]),
    "sketch": {"dtype": OneOf(ROW_DTYPES), "rank": Maybe(RANK)}, "adapters": Maybe([str]),
    "low_rank_updates": Maybe([Each(object)]),
    "optimizers": Maybe([{"class": str, "groups": Maybe([GROUP])}]), "coverage": Maybe(Each(object)),
    "weights_replaced": Maybe(bool), "shadows": Maybe([{**SHADOW, "status": str, "reason": str}]),
    "shadow_states": Maybe([{**SHADOW, "step": COUNT}]),
}  # fmt: skip
PART = {"rows": COUNT, "steps": COUNT, "examples": COUNT, "files": Each(FILE)}
_SHAPED = {"shape": [COUNT], "hash": str}

FORMS: tuple[tuple[str, Any], ...] = (
    (r"ledger\.json", {"parameters": Each([COUNT])}),
    (r"stages/[^/]+/stage\.json", STAGE),
    (r"stages/[^/]+/ending-[^/]*\.json", {"attempt": COUNT, "step": COUNT, "reason": str}),
    (r"stages/[^/]+/manifest-[^/]*\.json", {"parts": [PART]}),
    (r"stages/[^/]+/weights\.json", {
        "start": Maybe(Each(_SHAPED)), "end": Maybe(Each(_SHAPED)),
        "merged": Maybe(Each({**_SHAPED, "dtype": str, "values": [float]})),
    }),
    (r"stages/[^/]+/passes/[^/]+/pass\.json", {
        "data": str, "version": Whole(0, 9999), "dtype": OneOf(ROW_DTYPES), "examples": COUNT, "sealed": FILE,
        "parts": [{"rows": COUNT, "files": Each(FILE)}],
    }),
    (r"answers/[^/]+\.json", {"key": str, "title": str, "made": str, "parts": [{"kind": str}]}),
)  # fmt: skip
"""Names of files inside a ledger, and what they hold."""


class Document(dict[str, Any]):
    """An object of a ledger's JSON file that says which file it is where something is asked for that it does not have.

    Args:
        data: what it has.
        where: the file, for people.
    """

    def __init__(self, data: Iterable[tuple[str, Any]] | dict[str, Any] = (), where: str = "a document") -> None:
        super().__init__(data)
        self.where = where

    def __missing__(self, key: str) -> Any:
        raise _wrong(self.where, f"has no '{key}' where one is needed")


def check(name: str, data: Document) -> None:
    """Refuse a ledger's JSON file that does not hold what files of its name do. Files of another format are left to
    :func:`ledger.schema.check_format`.

    Args:
        name: of the file in the ledger.
        data: what it holds.

    Raises:
        LedgerFormatError: it does not.
    """
    form = next((form for pattern, form in FORMS if re.fullmatch(pattern, name)), None)
    if form is not None and data.get("format") in range(1, NEWEST + 1):
        _check(data, form, "", data.where)


def _check(found: Any, form: Any, at: str, where: str) -> None:
    if isinstance(form, Maybe):
        return None if found is None else _check(found, form.value, at, where)
    if isinstance(form, (dict, Each)):
        return _check_object(found, form, at, where)
    if isinstance(form, list):
        _expect(isinstance(found, list), found, "a list", at, where)
        for number, entry in enumerate(found):
            _check(entry, form[0], f"{at}[{number}]", where)
    elif isinstance(form, tuple):
        _expect(isinstance(found, list) and len(found) == len(form), found, f"a list of {len(form)}", at, where)
        for number, inner in enumerate(form):
            _check(found[number], inner, f"{at}[{number}]", where)
    elif isinstance(form, Whole):
        whole = type(found) is int and form.least <= found <= form.most
        _expect(whole, found, str(form), at, where)
    elif isinstance(form, OneOf):
        _expect(isinstance(found, str) and found in form.texts, found, str(form), at, where)
    elif form is float:
        _expect(type(found) in (int, float) and abs(found) < 1e300, found, "a number", at, where)
    elif form is not object:
        _expect(isinstance(found, form), found, {str: "a text", bool: "true or false"}[form], at, where)
    return None


def _check_object(found: Any, form: dict[str, Any] | Each, at: str, where: str) -> None:
    _expect(isinstance(found, dict), found, "an object", at, where)
    for key, inner in form.items() if isinstance(form, dict) else ((key, form.value) for key in found):
        if key in found:
            _check(found[key], inner, f"{at}{at and '.'}{key}", where)
        elif at and not isinstance(inner, Maybe):  # of the document as a whole, older versions wrote less
            raise _wrong(where, f"has no '{at}.{key}'")


def _expect(right: bool, found: Any, expected: str, at: str, where: str) -> None:
    if not right:
        said = repr(found) if isinstance(found, (int, float, str, bool)) or found is None else type(found).__name__
        raise _wrong(where, f"has {said[:60]} as '{at}', expected {expected}")


def _wrong(where: str, what: str) -> LedgerFormatError:
    return LedgerFormatError(
        f"{where} {what}.",
        cause="it was edited or damaged, or the ledger comes from someone who wants more than to be read.",
        fix="restore the file from a backup; do not use a ledger that you do not trust.",
    )
