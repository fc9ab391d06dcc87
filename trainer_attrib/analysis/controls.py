"""The controls of an influence: what a lexical search, plain gradient cosines and chance rank first."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import numpy as np

from trainer_attrib.analysis.beside import TOP, Beside, by_chance, compared
from trainer_attrib.analysis.influence_results import InfluenceExamples
from trainer_attrib.analysis.recipes.products import GradCos
from trainer_attrib.analysis.recipes.recipe import Question
from trainer_attrib.analysis.retrieval.best import best_places
from trainer_attrib.errors import AnalysisError, ConfigurationError, MissingExtraError
from trainer_attrib.evaluation.lexical import bm25_scores

BM25, COSINE, RANDOM = "bm25", GradCos.name, "random"
CONTROLS = (BM25, COSINE, RANDOM)


def controls_of(
    wanted: Sequence[str], question: Question, scores_QN: np.ndarray, examples: InfluenceExamples
) -> tuple[tuple[Beside, ...], tuple[str, ...]]:
    """The wanted controls beside scores, and a note for each that could not be had.

    Raises:
        ConfigurationError: there is no control of a name.
    """
    if unknown := set(wanted) - set(CONTROLS):
        raise ConfigurationError(f"Unknown controls {sorted(unknown)}.", fix=f"use some of {list(CONTROLS)}.")
    if not scores_QN.shape[1]:
        return (), ()

    @cache
    def ours() -> np.ndarray:
        return best_places(scores_QN, TOP, lambda _, at: examples.ids[at].astype(str), largest=True)

    make: dict[str, Callable[[], np.ndarray]] = {
        BM25: lambda: _lexical(question, examples),
        COSINE: lambda: _cosines(question, examples),
    }
    beside, notes = list[Beside](), list[str]()
    for name in wanted:
        if name == RANDOM:
            beside.append(by_chance(len(scores_QN), len(examples), min(TOP, len(examples))))
            continue
        try:
            beside.append(compared(name, make[name](), ours()))
        except (AnalysisError, MissingExtraError) as missing:
            notes.append(f"no {name} beside these scores: {str(missing).splitlines()[0]}")
    return tuple(beside), tuple(notes)


def _lexical(question: Question, examples: InfluenceExamples) -> np.ndarray:
    if not any(examples.texts):
        raise AnalysisError("the examples were recorded without texts.", fix="a data set with texts, if it has any.")
    texts = [text or "" for text in examples.texts]
    return bm25_scores([query for b in question.behaviors for query in b.queries], texts)


def _cosines(question: Question, examples: InfluenceExamples) -> np.ndarray:
    """In the order of the examples; below all others where an example has no row."""
    place = {key: at for at, key in enumerate(zip(examples.stages, examples.ids, strict=True))}
    found_QN = np.full((question.queries, len(examples)), -np.inf, np.float32)
    for stage in GradCos().score(question):
        keys = list(zip(stage.examples.stages, stage.examples.ids, strict=True))
        known = [n for n, key in enumerate(keys) if key in place]
        found_QN[:, [place[keys[n]] for n in known]] = stage.scores[:, known]
    return found_QN
