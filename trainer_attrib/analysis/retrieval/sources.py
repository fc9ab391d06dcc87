"""The data sources of examples, as numbers: no name is held for each of a million examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import pyarrow as pa

from trainer_attrib.analysis.retrieval.visits import PartVisits, numbered
from trainer_attrib.ledger.reader import RowPart, StageReader
from trainer_attrib.ledger.schema import EXAMPLES

Coded = tuple[Sequence[str | None], np.ndarray]
"""Names of sources, and which of them each of N examples has, [N]."""


class Sources(Protocol):
    """Knows the sources of the examples of a part."""

    def of(self, number: int, places: Sequence[RowPart], visits: PartVisits) -> tuple[Coded, PartVisits]:
        """Of some examples, and the examples with what else was read of them.

        Args:
            number: of the part, in the order in which parts are scored.
            places: of its rows in the ledger.
            visits: of its examples.
        """
        ...


@dataclass(frozen=True)
class FirstSeen:
    """For stages whose parts list the examples of all their rows: nothing of other parts is looked at.

    Args:
        reader: of the stage.
        columns: that are read of the examples, example and source among them.
    """

    reader: StageReader
    columns: Sequence[str] = ("example", "source")

    def of(self, number: int, places: Sequence[RowPart], visits: PartVisits) -> tuple[Coded, PartVisits]:
        """See :class:`Sources`."""
        tables = [self.reader.examples_in(place, self.columns) for place in places]
        examples = pa.concat_tables([EXAMPLES.empty_table().select(self.columns), *tables])
        same = examples["example"].combine_chunks().equals(visits.ids)
        return (in_order(examples), replace(visits, told=examples)) if same else (joined(visits.ids, examples), visits)


@dataclass(frozen=True)
class Numbered:
    """For stages of which all examples were counted.

    Args:
        coded: sources of all examples.
        numbers: of the examples of each part.
    """

    coded: Coded
    numbers: Sequence[np.ndarray]

    def of(self, number: int, places: Sequence[RowPart], visits: PartVisits) -> tuple[Coded, PartVisits]:
        """See :class:`Sources`."""
        names, codes_N = self.coded
        return (names, codes_N[self.numbers[number]]), visits


@dataclass(frozen=True)
class ByName:
    """For stages of which nothing else is known."""

    sources: Mapping[str, str | None]

    def of(self, number: int, places: Sequence[RowPart], visits: PartVisits) -> tuple[Coded, PartVisits]:
        """See :class:`Sources`."""
        return coded([self.sources.get(example) for example in visits.ids.to_pylist()]), visits


def coded(sources: Sequence[str | None]) -> Coded:
    """Sources that are given by name, one for each example."""
    codes = {name: code for code, name in enumerate(dict.fromkeys(sources))}
    return list(codes), np.array([codes[name] for name in sources], np.int32)


def in_order(examples: pa.Table) -> Coded:
    """The sources of examples in the order of the ledger's column source."""
    coded = examples["source"].combine_chunks().dictionary_encode()
    codes_N = coded.indices.fill_null(-1).to_numpy(zero_copy_only=False)  # the last name: none
    return [*coded.dictionary.to_pylist(), None], codes_N


def joined(ids: pa.Array, examples: pa.Table) -> Coded:
    """The sources of examples from the ledger's columns example and source.

    Args:
        ids: of examples, each once, [N].
        examples: in any order, others among them.
    """
    names, codes_M = in_order(examples)
    at = numbered([ids, *examples["example"].chunks])[1][len(ids) :]
    codes_N, here = np.full(len(ids), -1, np.int32), at < len(ids)
    codes_N[at[here]] = codes_M[here]
    return names, codes_N
