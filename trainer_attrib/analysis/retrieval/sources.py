"""The data sources of examples, as numbers: no name is held for each of a million examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import pyarrow as pa

from trainer_attrib.analysis.retrieval.visits import numbered
from trainer_attrib.ledger.reader import RowPart, StageReader

Coded = tuple[Sequence[str | None], np.ndarray]
"""Names of sources, and which of them each of N examples has, [N]."""


class Sources(Protocol):
    """Knows the sources of the examples of a part."""

    def of(self, number: int, places: Sequence[RowPart], ids: pa.Array) -> Coded:
        """Of some examples.

        Args:
            number: of the part, in the order in which parts are scored.
            places: of its rows in the ledger.
            ids: of its examples, each once.
        """
        ...


@dataclass(frozen=True)
class FirstSeen:
    """For stages whose parts list the examples of all their rows: nothing of other parts is looked at."""

    reader: StageReader

    def of(self, number: int, places: Sequence[RowPart], ids: pa.Array) -> Coded:
        """See :class:`Sources`."""
        tables = [self.reader.examples_in(place, ("example", "source")) for place in places]
        return joined(ids, pa.concat_tables(tables)) if tables else ([None], np.full(len(ids), 0, np.int32))


@dataclass(frozen=True)
class Numbered:
    """For stages of which all examples were counted.

    Args:
        coded: sources of all examples.
        numbers: of the examples of each part.
    """

    coded: Coded
    numbers: Sequence[np.ndarray]

    def of(self, number: int, places: Sequence[RowPart], ids: pa.Array) -> Coded:
        """See :class:`Sources`."""
        names, codes_N = self.coded
        return names, codes_N[self.numbers[number]]


@dataclass(frozen=True)
class ByName:
    """For stages of which nothing else is known."""

    sources: Mapping[str, str | None]

    def of(self, number: int, places: Sequence[RowPart], ids: pa.Array) -> Coded:
        """See :class:`Sources`."""
        return coded([self.sources.get(example) for example in ids.to_pylist()])


def coded(sources: Sequence[str | None]) -> Coded:
    """Sources that are given by name, one for each example."""
    codes = {name: code for code, name in enumerate(dict.fromkeys(sources))}
    return list(codes), np.array([codes[name] for name in sources], np.int32)


def joined(ids: pa.Array, examples: pa.Table) -> Coded:
    """The sources of examples from the ledger's columns example and source.

    Args:
        ids: of examples, each once, [N].
        examples: in any order, others among them.
    """
    at = numbered([ids, *examples["example"].chunks])[1][len(ids) :]
    coded, here = examples["source"].combine_chunks().dictionary_encode(), at < len(ids)
    codes_N = np.full(len(ids), -1, np.int32)  # the last name: none
    codes_N[at[here]] = coded.indices.fill_null(-1).to_numpy(zero_copy_only=False)[here]
    return [*coded.dictionary.to_pylist(), None], codes_N
