"""The same examples under two sets of names: those that a ledger or a result knows, and those that are at hand."""

from __future__ import annotations

from collections.abc import Sequence

RECORDED_CHARACTERS = 2000
"""Callbacks record so much of a text; what follows cannot tell two examples apart."""


def places_of(
    ids: Sequence[str], texts: Sequence[str | None], given_ids: Sequence[str], given_texts: Sequence[str | None]
) -> list[list[int]]:
    """Where examples are among given ones: one place by id, or all places of the same text; none where they are not.

    Ids decide unless texts find more of the examples: what was named by a hash of its content when it was recorded has
    other ids in a file. Texts are compared without regard to white space.

    Args:
        ids: of the examples.
        texts: of the examples, None where unknown.
        given_ids: unique.
        given_texts: of the given examples.
    """
    at = {example: place for place, example in enumerate(given_ids)}
    by_id = [[at[example]] if example in at else [] for example in ids]
    if all(by_id):
        return by_id
    said: dict[str, list[int]] = {}
    for place, text in enumerate(given_texts):
        if text:
            said.setdefault(_key(text), []).append(place)
    by_text = [said.get(_key(text), []) if text else [] for text in texts]
    return max(by_id, by_text, key=lambda found: sum(map(bool, found)))


def _key(text: str) -> str:
    return " ".join(text[:RECORDED_CHARACTERS].split())
