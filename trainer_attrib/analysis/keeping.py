"""Answers kept in a ledger, to be looked at later without the model."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from trainer_attrib.analysis.results import Result
from trainer_attrib.errors import ConfigurationError
from trainer_attrib.ledger.kept import Answers, key_of
from trainer_attrib.ledger.reader import Ledger


def keep(
    ledger: str | os.PathLike[str] | Ledger, *results: Result, title: str = "", asked: Mapping[str, Any] | None = None
) -> str:
    """Store results as one answer in a ledger, where the explorer and the report find them.

    Args:
        ledger: that the results are about.
        results: shown together, such as a forecast and its contributions.
        title: in lists; by default the names of the results.
        asked: the question, JSON-ready. The answer to the same question is replaced.

    Returns:
        The key of the answer.

    Raises:
        ConfigurationError: no results.
        LedgerNotWritableError: the ledger cannot be written.
    """
    if not results:
        raise ConfigurationError("There is no result to keep.", fix="pass at least one.")
    title = title or ", ".join(_words(type(result).__name__) for result in results)
    scores = next((table for table in (result.all_scores() for result in results) if table is not None), None)
    parts = [{"kind": result.kind, **result.shown()} for result in results]
    return Answers((ledger if isinstance(ledger, Ledger) else Ledger(ledger)).storage).keep(title, parts, asked, scores)


def recall(ledger: Ledger, asked: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """The parts of the answer to a question, if it was kept."""
    answers = Answers(ledger.storage)
    return answers.read(key_of(asked))["parts"] if answers.has(key_of(asked)) else None


def _words(name: str) -> str:
    return "".join(f" {letter.lower()}" if letter.isupper() else letter for letter in name).strip().capitalize()
