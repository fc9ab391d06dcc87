"""Exact scores of the few examples that an approximate index proposes, and how many of the best it missed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor

from trainer_attrib.analysis.recipes.recipe import Question
from trainer_attrib.analysis.recipes.rows import Exact, RowRecipe
from trainer_attrib.analysis.recipes.streamed import Rows, StreamedStage
from trainer_attrib.analysis.retrieval.faiss_candidates import Faiss, Index
from trainer_attrib.analysis.retrieval.visits import Found
from trainer_attrib.analysis.retrieval.where import Where
from trainer_attrib.numerics.scores import rank


@dataclass(frozen=True)
class Products:
    """A function that scores rows, and orders them as inner products of one vector per row with one per query do.

    Args:
        score: rows [N] -> scores [Q, N].
        queries: second-moment version -> vectors of all queries, [Q, K].
        vectors: of rows, [N, K].
        fixed: whether the rows' vectors are the same whatever is asked.
    """

    score: Callable[[Rows], Tensor]
    queries: Callable[[int], Tensor]
    vectors: Callable[[Rows], Tensor]
    fixed: bool = True

    def __call__(self, rows: Rows) -> Tensor:
        """The scores."""
        return self.score(rows)

    def near(
        self, recipe: RowRecipe, question: Question, stage: StreamedStage, finder: Faiss, exact: Exact
    ) -> tuple[Found, list[str]]:
        """See :meth:`trainer_attrib.analysis.recipes.rows.Proposing.near`."""
        shape = stage.keep.numpy().tobytes(), len(stage.parts)
        key = (recipe, question.where, *shape) if self.fixed else None
        index = finder.index(stage.reader, key, lambda: _vectors(stage, question, self))
        if index.said is None:
            index.said = stage.tally
        proposed = index.propose(self.queries)
        found = exact(replace(question, where=replace(question.where or Where(), ids=proposed)), self, question.queries)
        recall = _recall(question, index, self, finder, found, exact)
        stage.tally = index.said
        name = stage.reader.name
        return found, [
            f"stage '{name}': {len(proposed)} examples proposed by an approximate index were scored; {recall}",
            f"stage '{name}': sums over sources and steps are not known, since not all rows were scored",
        ]


def _vectors(stage: StreamedStage, question: Question, score: Products) -> Iterator[tuple[int, list[str], np.ndarray]]:
    for table, rows in stage.stream("indexing", question.where):
        yield rows.version, table["example"].to_pylist(), score.vectors(rows).numpy()


def _recall(question: Question, index: Index, score: Products, finder: Faiss, found: Found, exact: Exact) -> str:
    """Of which share of the exact scan's ends was found, over some queries. What is kept with the index is repeated."""
    keep, sample = question.keep or 0, finder.sample(question.queries)
    if finder.measured is not None and keep in index.recalls:
        return f"{index.recalls[keep]}, of the queries that the index was first used for"
    truth = exact(question, lambda rows: score(rows)[sample], len(sample))
    pairs = [
        (_end(truth, n, keep, largest), _end(found, int(query), keep, largest))
        for n, query in enumerate(sample)
        for largest in (True, False)
    ]
    wanted = sum(len(true) for true, _ in pairs)
    share = sum(len(true & ours) for true, ours in pairs) / wanted if wanted else float("nan")
    index.recalls[keep] = f"recall@{keep} against the exact scan is {share:.3f} over both ends of {len(sample)} queries"
    return index.recalls[keep]


def _end(found: Found, query: int, keep: int, largest: bool) -> set[str]:
    places = np.arange(len(found.ids)) if found.places is None else found.places[query]
    ids = np.array(found.ids, dtype=object)[places].astype(str)
    return set(ids[rank(found.scores[query], ids, keep, largest=largest)].tolist())
