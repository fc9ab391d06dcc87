"""Taking suspects out of a data set: which rows they are, and what is left without them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trainer_attrib.analysis.matching import places_of
from trainer_attrib.errors import ConfigurationError, MissingDataError


@dataclass(frozen=True)
class Rows:
    """The rows of a data set of Hugging Face ``datasets``, or a list of dicts, by name.

    Args:
        dataset: of N rows.
        id_column: that names them. A row without it has its number for a name, counted from 0.
    """

    dataset: Any
    id_column: str = "id"

    @property
    def ids(self) -> list[str]:
        """Of all rows."""
        found = self._column(self.id_column)
        return [str(number if value is None else value) for number, value in enumerate(found)]

    @property
    def texts(self) -> list[str | None]:
        """The column ``text``, or a prompt and its completion; None where a row has neither."""
        columns = zip(*(self._column(name) for name in ("text", "prompt", "completion")), strict=True)
        return [_text(*values) for values in columns]

    def some(self, places: Sequence[int]) -> Any:
        """The rows at these places, as the kind of data set that this is."""
        if hasattr(self.dataset, "select"):
            return self.dataset.select(places)
        return [self.dataset[place] for place in places]

    def without(self, places: Mapping[int, Any]) -> Any:
        """All other rows.

        Raises:
            ConfigurationError: none would be left.
        """
        left = [place for place in range(len(self.dataset)) if place not in places]
        if not left:
            raise ConfigurationError(
                f"All {len(places)} rows of the data set are suspects: nothing would be left.",
                fix="ask for fewer suspects (k).",
            )
        return self.some(left)

    def places(self, ids: Sequence[str], texts: Sequence[str | None]) -> list[list[int]]:
        """Where examples are among the rows, by id or by text; see :func:`~trainer_attrib.analysis.matching.places_of`.

        Raises:
            MissingDataError: one of them is not there.
            ConfigurationError: two rows have the same id.
        """
        named = self.ids
        if len(set(named)) < len(named):
            raise ConfigurationError(
                f"Column '{self.id_column}' has {len(set(named))} different values in {len(named)} rows.",
                fix="name a column with a unique id per row as `id_column`.",
            )
        found = places_of(ids, texts, named, self.texts)
        if missing := [example for example, places in zip(ids, found, strict=True) if not places]:
            raise MissingDataError(
                f"{len(missing)} of {len(ids)} suspects are not in the data set of {len(named)} rows: {missing[:3]}; "
                f"its rows are called {named[:3]}.",
                cause="it is the data set of another stage, its rows are named by another column, or their texts are "
                "not those that were trained on.",
                fix="pass the data set that the stage was trained on, with its `id_column`.",
            )
        return found

    def _column(self, name: str) -> Sequence[Any]:
        if (columns := getattr(self.dataset, "column_names", None)) is not None:
            return self.dataset[name] if name in columns else [None] * len(self.dataset)
        return [row.get(name) if isinstance(row, Mapping) else None for row in self.dataset]


def _text(text: Any, prompt: Any, completion: Any) -> str | None:
    if isinstance(text, str):
        return text
    return prompt + completion if isinstance(prompt, str) and isinstance(completion, str) else None
