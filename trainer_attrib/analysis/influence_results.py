"""Frozen answers on examples: their scores for queries. As in results.py, nothing is computed here but rankings."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from trainer_attrib.analysis.beside import Beside, said
from trainer_attrib.analysis.results import Result
from trainer_attrib.analysis.retrieval.groups import StageSums, group_grids, source_rows, step_rows
from trainer_attrib.analysis.tables import aligned, cut, in_figure, require_matplotlib, shortened
from trainer_attrib.errors import ConfigurationError
from trainer_attrib.numerics.scores import rank
from trainer_attrib.report.blocks import Block, Example, Grid, Notes, Ranking, Rankings
from trainer_attrib.report.pair import write_pair


@dataclass(frozen=True)
class InfluenceExamples:
    """The examples that were scored, one entry each: columns of equal length N."""

    stages: np.ndarray
    ids: np.ndarray
    steps: np.ndarray  # last step in which the example took part
    sources: Sequence[str | None]
    texts: Sequence[str | None]

    def __len__(self) -> int:
        return len(self.ids)

    @staticmethod
    def concatenate(parts: Sequence[InfluenceExamples]) -> InfluenceExamples:
        """The examples of several stages, in order."""
        if len(parts) == 1:
            return parts[0]
        return InfluenceExamples(
            np.concatenate([part.stages for part in parts]),
            np.concatenate([part.ids for part in parts]),
            np.concatenate([part.steps for part in parts]),
            [source for part in parts for source in part.sources],
            [text for part in parts for text in part.texts],
        )


@dataclass(frozen=True)
class TokenScores:
    """An example token by token: what each adds to the text, and its score, float32."""

    pieces: tuple[str, ...]
    scores: np.ndarray


@dataclass(frozen=True, repr=False)
class Influence(Result):
    """Scores of training examples for queries; positive means that training on the example increased the behavior.

    ``scores`` is float32 [Q, N]; ``behaviors`` and ``queries`` name its rows, ``examples`` its columns. Where only
    ``keep`` examples at either end are known, it is [Q, M], NaN where there are fewer, and ``places`` [Q, M] tells of
    which example each is. ``beside`` is what controls rank first for the same queries: a lexical search, plain gradient
    cosines, chance. ``tokens`` has scores of the tokens of some examples by query and example
    (``analyzer.token_scores``).
    """

    behaviors: tuple[str, ...]
    queries: tuple[str, ...]
    scores: np.ndarray
    examples: InfluenceExamples
    recipe: str
    caveats: tuple[str, ...] = ()
    beside: tuple[Beside, ...] = ()
    tokens: Mapping[tuple[int, int], TokenScores] = field(default_factory=dict)
    places: np.ndarray | None = None
    keep: int | None = None
    sums: tuple[StageSums, ...] = ()
    kind = "influence"

    def shown(self, k: int = 100) -> dict[str, Any]:
        """Both ends of every ranking, sums by step and source, what controls rank first."""
        k = k if self.keep is None else min(k, self.keep)
        steps, sources = (_by_query(table) for table in (self.by_steps(20), self.by_source()))
        queries = [
            {"behavior": self.behaviors[q], "query": self.queries[q], "top": self._shown_rows(q, k, largest=True),
             "bottom": self._shown_rows(q, k, largest=False),
             "steps": steps.get((self.behaviors[q], self.queries[q]), []),
             "sources": sources.get((self.behaviors[q], self.queries[q]), [])}
            for q in range(len(self.queries))
        ]  # fmt: skip
        beside = [
            {"name": b.name, "shared": b.mean, "standard_error": b.standard_error, "k": b.top.shape[1],
             "first": [self._shown(int(at)) for at in b.top[:, 0]]}
            for b in self.beside
        ]  # fmt: skip
        return {"recipe": self.recipe, "examples": len(self.examples), "kept": k, "queries": queries, "beside": beside,
                "caveats": list(self.caveats)}  # fmt: skip

    def all_scores(self) -> pa.Table | None:
        """See :meth:`trainer_attrib.analysis.results.Result.all_scores`; None where only the ends are known."""
        if self.places is not None:
            return None
        columns: dict[str, Any] = {
            "stage": pa.array(self.examples.stages.astype(str)).dictionary_encode(),
            "example": pa.array(self.examples.ids.astype(str)),
            "step": pa.array(self.examples.steps.astype(np.int64)),
        }
        return pa.table(columns | {f"query {q}": row for q, row in enumerate(self.scores)})

    def top(self, k: int = 10) -> pa.Table:
        """The k examples that increased each behavior most, best first.

        Raises:
            ConfigurationError: fewer were kept.
        """
        return self._ranked(self._known(k), largest=True)

    def bottom(self, k: int = 10) -> pa.Table:
        """The k examples that decreased each behavior most, strongest first.

        Raises:
            ConfigurationError: fewer were kept.
        """
        return self._ranked(self._known(k), largest=False)

    def to_table(self) -> pa.Table:
        """Every score that is known. Columns behavior, query, stage, example, rank, score, step, source, text."""
        return self._ranked(self.scores.shape[1], largest=True)

    def by_source(self) -> pa.Table:
        """Sums over all rows of each data source. Columns behavior, query, stage, source, sum, mean, count.

        An example counts once for every visit of it that was recorded; of recipes that score no single visits, once.
        """
        return self._grouped(lambda query: source_rows(self.sums, query))

    def by_steps(self, bins: int | Sequence[int] = 10) -> pa.Table:
        """Sums over all rows of ranges of optimizer steps. Columns behavior, query, stage, first_step, last_step, sum,
        mean, count.

        Args:
            bins: so many ranges of equal length in each stage, or the first step of each range.
        """
        return self._grouped(lambda query: step_rows(self.sums, query, bins))

    def token_table(self) -> pa.Table:
        """Scores of tokens. Columns behavior, query, stage, example, position, token, score."""
        columns = {"behavior": pa.string(), "query": pa.string(), "stage": pa.string(), "example": pa.string()}
        columns |= {"position": pa.int64(), "token": pa.string(), "score": pa.float64()}
        rows = [
            (
                self.behaviors[q],
                self.queries[q],
                str(self.examples.stages[n]),
                str(self.examples.ids[n]),
                i,
                token,
                score,
            )
            for (q, n), found in self.tokens.items()
            for i, (token, score) in enumerate(zip(found.pieces, found.scores.tolist(), strict=True))
        ]
        return pa.Table.from_pylist([dict(zip(columns, row, strict=True)) for row in rows], pa.schema(columns))

    def to_dict(self, k: int = 10) -> dict[str, Any]:
        """JSON-ready: both ends of every ranking."""
        ends = {"top": self.top(k).to_pylist(), "bottom": self.bottom(k).to_pylist()}
        beside = {b.name: {"shared": b.mean, "standard_error": b.standard_error} for b in self.beside}
        return {"recipe": self.recipe, "caveats": list(self.caveats), "shared_with": beside, **ends}

    def export_pair(self, path: str | os.PathLike[str], k: int = 100, correct: np.ndarray | None = None) -> Path:
        """Write the k best and worst examples of every query as the JSON lines that the viewer of PAIR's
        pretraining-tda opens (https://pair-code.github.io/pretraining-tda/demo); returns the path.

        Args:
            path: of the file, usually ``.jsonl``.
            k: examples at each end.
            correct: boolean [Q, N], whether an example is relevant to a query, from which the viewer shows
                recall and reciprocal ranks.
        """
        records = []
        for query, (behavior, prompt) in enumerate(zip(self.behaviors, self.queries, strict=True)):
            best, worst = (self.order(query, k, largest=end) for end in (True, False))
            record = {"example_id": f"{behavior}/{query}", "query_set": behavior, "inputs_plaintext": prompt}
            record |= self._ends("proponent", query, best) | self._ends("opponent", query, worst)
            if correct is not None:
                record["proponent_correct"] = [bool(correct[query, at]) for at in best]
            records.append(record)
        return write_pair(path, records)

    def _ends(self, kind: str, query: int, order: np.ndarray) -> dict[str, list[Any]]:
        return {
            f"{kind}s": [self.examples.texts[at] or "" for at in order],
            f"{kind}_ids": [f"{self.examples.stages[at]}/{self.examples.ids[at]}" for at in order],
            f"{kind}_scores": [float(self.scores[query, at]) for at in order],
        }

    def blocks(self) -> list[Block]:
        """Proponents and opponents of every query side by side, the caveats."""
        rankings = [
            Ranking(f"{self.behaviors[q]}: {self.queries[q]}", *(self._examples(q, end) for end in (True, False)))
            for q in range(len(self.queries))
        ]
        kept = "" if self.keep is None else f" at the ends of the rankings, {self.keep:,} at each"
        note = f"Recipe {self.recipe}, over {len(self.examples):,} training examples{kept}. "
        note += "Positive scores: training on the example increased the behavior."
        if self.tokens:
            note += " Tokens: green increased it, red decreased it, in full color the strongest of the example."
        lists = Rankings("Training examples", rankings, note)
        groups = group_grids(self.sums, self.behaviors)
        return [lists, *self._controls(), *groups, Notes("What to keep in mind", self.caveats)]

    def _controls(self, queries: int = 5) -> list[Block]:
        """How many of the best examples other rankings share, and what they put first for a few queries."""
        if not self.beside:
            return []
        k = self.beside[0].top.shape[1]
        shared = [(b.name, b.mean, b.standard_error) for b in self.beside]
        columns = ("ranking", f"of the top {k}, also in its top {k}", "standard error over queries")
        note = "What a search for words or a plain comparison of gradients finds too is no merit of the method."
        first = [
            [self.queries[q], self._shown(int(self.order(q, 1, largest=True)[0]))]
            + [self._shown(int(b.top[q, 0])) for b in self.beside]
            for q in range(min(queries, len(self.queries)))
        ]
        names = ("query", self.recipe, *(b.name for b in self.beside))
        return [
            Grid("The same queries by other rankings", columns, shared, note),
            Grid("First by each ranking", names, first),
        ]

    def _shown(self, at: int) -> str:
        return shortened(self.examples.texts[at] or str(self.examples.ids[at]))

    def plot(self) -> Any:
        """A matplotlib figure with the sorted scores of every query. Needs the extra ``plot``."""
        figure, axis = require_matplotlib().subplots(figsize=(7, 3), layout="tight")
        for scores in self.scores[:10]:
            axis.plot(np.sort(scores[~np.isnan(scores)])[::-1], linewidth=1)
        axis.axhline(0, color="black", linewidth=0.8)
        axis.set(xlabel="rank", ylabel=in_figure(self.recipe), title="Scores of all examples, one line per query")
        return figure

    def __repr__(self) -> str:
        lines = []
        for query in range(min(len(self.queries), 5)):
            rows = [self._row(query, n, int(at)) for n, at in enumerate(self.order(query, 3, largest=True))]
            cells = [(f"{r['score']:+.3f}", r["stage"], r["example"], r["text"] or "") for r in rows]
            lines += [f"{self.behaviors[query]}: {self.queries[query]}", aligned((), cells), ""]
        hidden = len(self.queries) - 5
        lines += [f"... and {hidden} more queries"] if hidden > 0 else []
        lines += [said(self.beside)] if self.beside else []
        return "\n".join([*lines, *(f"note: {caveat}" for caveat in self.caveats)])

    def order(self, query: int, k: int, *, largest: bool) -> np.ndarray:
        """Numbers of the k examples at one end of a query's ranking, the outermost first."""
        found = self._order(query, k, largest=largest)
        return found if self.places is None else self.places[query][found]

    def _shown_rows(self, query: int, k: int, *, largest: bool) -> list[dict[str, Any]]:
        found = []
        for place, at in enumerate(self._order(query, k, largest=largest)):
            row = self._row(query, place, int(at))
            told = {name: row[name] for name in ("stage", "example", "step", "source", "score")}
            tokens = [[piece, round(score, 6)] for piece, score in self._tokens(query, int(at))]
            found.append(told | {"text": cut(row["text"] or "")} | ({"tokens": tokens} if tokens else {}))
        return found

    def _known(self, k: int) -> int:
        if self.keep is not None and k > self.keep:
            raise ConfigurationError(
                f"{k} examples were asked for, {self.keep} of either end were kept.",
                fix=f"analyzer.influence(..., keep={k}).",
            )
        return k

    def _grouped(self, rows_of: Callable[[int], list[dict[str, Any]]]) -> pa.Table:
        named = enumerate(zip(self.behaviors, self.queries, strict=True))
        return pa.Table.from_pylist(
            [
                {"behavior": behavior, "query": text, **row}
                for query, (behavior, text) in named
                for row in rows_of(query)
            ]
        )

    def _order(self, query: int, k: int, *, largest: bool) -> np.ndarray:
        """Places in a row of the scores."""
        ids = self.examples.ids if self.places is None else self.examples.ids[self.places[query]]
        return rank(self.scores[query], ids.astype(str), k, largest=largest)

    def _ranked(self, k: int, *, largest: bool) -> pa.Table:
        order = [(q, self._order(q, k, largest=largest)) for q in range(len(self.queries))]
        return pa.Table.from_pylist([self._row(q, n, int(at)) for q, found in order for n, at in enumerate(found)])

    def _row(self, query: int, place: int, at: int) -> dict[str, Any]:
        example = at if self.places is None else int(self.places[query, at])
        return {
            "behavior": self.behaviors[query],
            "query": self.queries[query],
            "stage": str(self.examples.stages[example]),
            "example": str(self.examples.ids[example]),
            "rank": place + 1,
            "score": float(self.scores[query, at]),
            "step": int(self.examples.steps[example]),
            "source": self.examples.sources[example],
            "text": self.examples.texts[example],
        }

    def _examples(self, query: int, largest: bool, k: int = 8) -> list[Example]:
        rows = [(int(at), self._row(query, n, int(at))) for n, at in enumerate(self._order(query, k, largest=largest))]
        return [
            Example(
                r["score"],
                r["example"],
                r["stage"],
                r["step"],
                r["source"] or "",
                r["text"] or "",
                self._tokens(query, at),
            )
            for at, r in rows
        ]

    def _tokens(self, query: int, at: int) -> list[tuple[str, float]]:
        found = self.tokens.get((query, at if self.places is None else int(self.places[query, at])))
        return [] if found is None else list(zip(found.pieces, found.scores.tolist(), strict=True))


def _by_query(table: pa.Table) -> dict[tuple[str, str], list[dict[str, Any]]]:
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in table.to_pylist():
        found.setdefault((row.pop("behavior"), row.pop("query")), []).append(row)
    return found
