"""The same examples under two sets of names: those that a ledger or a result knows, and those that are at hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from trainer_attrib.ledger.reader import StageReader

RECORDED_CHARACTERS = 2000
"""Callbacks record so much of a text; what follows cannot tell two examples apart."""


def places_of(
    ids: Sequence[str], texts: Sequence[str | None], given_ids: Sequence[str], given_texts: Sequence[str | None]
) -> list[list[int]]:
    """Where examples are among given ones: one place by id, or all places of the same text; none where they are not.

    Texts are asked where no id is known at all: what was named by a hash of its content when it was recorded has other
    ids in a file. They are compared without regard to white space.

    Args:
        ids: of the examples.
        texts: of the examples, None where unknown.
        given_ids: unique.
        given_texts: of the given examples.
    """
    at = {example: place for place, example in enumerate(given_ids)}
    by_id = [[at[example]] if example in at else [] for example in ids]
    if any(by_id):
        return by_id
    said: dict[str, list[int]] = {}
    for place, text in enumerate(given_texts):
        if text:
            said.setdefault(_key(text), []).append(place)
    return [said.get(_key(text), []) if text else [] for text in texts]


@dataclass(frozen=True)
class Recorded:
    """What a stage's ledger knows of an example: the last step that trained on it, its source and its text."""

    step: int
    source: str | None
    text: str | None


def recorded_of(stage: StageReader, ids: Sequence[str], texts: Sequence[str | None]) -> list[Recorded | None]:
    """Examples as a stage recorded them, by id or by text; None for those that it did not."""
    table = stage.examples().to_pylist()
    found = places_of(ids, texts, [row["example"] for row in table], [row["text"] for row in table])
    wanted = {table[places[0]]["example"] for places in found if places}
    steps = dict.fromkeys(wanted, 0)
    for block in stage.rows():
        for example, step in zip(block.table["example"].to_pylist(), block.table["step"].to_pylist(), strict=True):
            if example in steps:
                steps[example] = max(step, steps[example])
    rows = [table[places[0]] if places else None for places in found]
    return [row and Recorded(steps[row["example"]], row["source"], row["text"]) for row in rows]


def _key(text: str) -> str:
    return " ".join(text[:RECORDED_CHARACTERS].split())
