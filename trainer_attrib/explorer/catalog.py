"""What there is to see of a ledger: addresses -> JSON-ready data. The page draws nothing that is not from here."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import numpy as np
import pyarrow as pa

from trainer_attrib.errors import LedgerNotWritableError
from trainer_attrib.explorer.example_map import example_map
from trainer_attrib.explorer.example_table import Conditions, ExampleTable, number
from trainer_attrib.ledger.kept import Answers, key_of, state_of
from trainer_attrib.ledger.overview import overview
from trainer_attrib.ledger.reader import Ledger

CURVES = ("loss", "learning_rate", "gradient_norm")
POINTS = 600  # of a curve


class Catalog:
    """The pages of one ledger, as it is at the moment: a stage may be recorded while it is looked at."""

    def __init__(self, ledger: str | os.PathLike[str] | Ledger) -> None:
        self.ledger = ledger if isinstance(ledger, Ledger) else Ledger(ledger)
        self.answers = Answers(self.ledger.storage)
        self._examples: tuple[str, ExampleTable] | None = None
        self._scores: tuple[tuple[str, str], pa.Table, np.ndarray] | None = None
        self._maps: dict[tuple[str, str], dict[str, Any]] = {}

    @property
    def name(self) -> str:
        """Last part of the ledger's address."""
        return re.split(r"[/\\]", self.ledger.storage.url.rstrip("/\\"))[-1] or self.ledger.storage.url

    @property
    def state(self) -> str:
        """Changes when something is recorded."""
        return state_of(self.ledger.stages())

    @property
    def examples(self) -> ExampleTable:
        """All of them, read again when some were added."""
        state = self.state
        known = self._examples
        if known is None or known[0] != state:
            self._examples = known = (state, ExampleTable(self.ledger))
        return known[1]

    def data(self, path: str, asked: Mapping[str, str]) -> dict[str, Any]:
        """What the page at an address shows.

        Raises:
            LookupError: there is no such page.
            TrainerAttribError: what the address asks for is not there, or damaged.
        """
        match path.split("/"):
            case ["ledger"]:
                return overview(self.ledger)
            case ["facets"]:
                return self.examples.facets()
            case ["curves", name]:
                return self.curves(name)
            case ["answers"]:
                return {"answers": [a for a in self.answers.listed() if a["kinds"] != ["map"]]}
            case ["answers", key]:
                return self.answers.read(key)
            case ["answers", key, "filtered"]:
                return self.filtered(key, asked)
            case ["examples"]:
                return self.examples.page(
                    Conditions.of(asked), number(asked, "offset"), number(asked, "limit", 50, 500)
                )
            case ["map", name]:
                return self.map(name)
        raise LookupError(path)

    def curves(self, name: str) -> dict[str, Any]:
        """Loss, learning rate (of the first parameter group) and gradient norm of a stage's steps, thinned.

        Raises:
            StageNotFoundError: no such stage.
        """
        steps = self.ledger.stage(name).steps()
        every = max(1, -(-steps.num_rows // POINTS))
        thinned = steps.take(np.arange(0, steps.num_rows, every)).select(["step", *CURVES]).to_pylist()
        told = [row | {"learning_rate": (row["learning_rate"] or [None])[0]} for row in thinned]
        return {"stage": name, "steps": steps.num_rows, "points": [{k: _known(v) for k, v in r.items()} for r in told]}

    def filtered(self, key: str, asked: Mapping[str, str]) -> dict[str, Any]:
        """Both ends of one query's ranking over the examples that meet conditions.

        Raises:
            LookupError: the answer has no scores of all examples, or not of this query.
        """
        examples, query = self.examples, number(asked, "query")
        scores, places = self._scored(key, examples)
        if f"query {query}" not in scores.column_names:
            raise LookupError(key)
        found = np.flatnonzero(examples.matching(Conditions.of(asked))[places] & (places >= 0))
        values = scores[f"query {query}"].to_numpy()[found]
        found, values = found[~np.isnan(values)], values[~np.isnan(values)]
        limit = number(asked, "limit", 20, 500)
        order = np.argsort(-values, kind="stable")
        ends = {"top": order[:limit], "bottom": order[::-1][:limit]}
        told = {
            end: [
                row | {"score": float(values[at])}
                for at, row in zip(chosen, examples.rows(places[found[chosen]]), strict=True)
            ]
            for end, chosen in ends.items()
        }
        return {"matching": len(found), "examples": scores.num_rows, **told}

    def map(self, name: str) -> dict[str, Any]:
        """Positions of a stage's examples, computed once and kept, in memory where the ledger cannot be written.

        Raises:
            StageNotFoundError: no such stage.
        """
        stage, asked = self.ledger.stage(name), self._asked_map(name)
        if self.answers.has(key_of(asked)):
            found = self.answers.read(key_of(asked))["parts"][0]
        elif (found := self._maps.get((name, asked["state"]))) is None:
            found = self._maps[name, asked["state"]] = {"kind": "map", **example_map(stage)}
            with suppress(LedgerNotWritableError):
                self.answers.keep(f"Map of {name}", [found], asked)
        sources = stage.examples()["source"].fill_null("").dictionary_encode().combine_chunks()
        assert isinstance(sources, pa.DictionaryArray)
        return {**found, "sources": sources.dictionary.to_pylist(), "source": sources.indices.to_pylist()}

    def has_map(self, name: str) -> bool:
        """Whether the map of a stage need not be computed."""
        asked = self._asked_map(name)
        return (name, asked["state"]) in self._maps or self.answers.has(key_of(asked))

    def _asked_map(self, name: str) -> dict[str, str]:
        return {"map": name, "state": self.state}

    def _scored(self, key: str, examples: ExampleTable) -> tuple[pa.Table, np.ndarray]:
        """Scores of an answer and the numbers of its examples in the table, -1 for those that it does not have. The
        last answer's are remembered."""
        known, asked = self._scores, (key, self.state)
        if known is None or known[0] != asked:
            found = self.answers.scores(key)
            if found is None:
                raise LookupError(key)
            names = zip(found["stage"].to_pylist(), found["example"].to_pylist(), strict=True)
            places = np.array([examples.places.get(pair, -1) for pair in names], np.int64)
            self._scores = known = (asked, found, places)
        return known[1], known[2]


def _known(value: Any) -> Any:
    return None if isinstance(value, float) and not np.isfinite(value) else value
