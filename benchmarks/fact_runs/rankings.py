"""The rankings that are compared: random, lexical, gradients, and TrackStar with one ingredient after the other."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from fact_runs.case import Case, Trained
from fact_runs.training import STAGE
from trainer_attrib import Analyzer
from trainer_attrib.analysis.recipes.products import GradCos, GradDot
from trainer_attrib.analysis.recipes.recipe import Recipe
from trainer_attrib.analysis.recipes.trackstar import CROSSING, TrackStar
from trainer_attrib.evaluation.lexical import bm25_scores, tfidf_scores
from trainer_attrib.evaluation.tail_patch import PatchStep, TailPatch, tail_patch
from trainer_attrib.ledger.reader import Ledger
from trainer_attrib.numerics.row_curvature import SecondMoments, mixing_weight, shrunk

BM25, KEYWORDS, TFIDF = "bm25", "bm25, names only", "tf-idf"
DOT, UNIT = "gradient dot", "gradient cosine (unit norm)"
RAW_R, CORRECTED = "unit norm + R, no correction", "+ correction"
TRAIN, TASK, MIXED = "+ correction + R_train", "+ correction + R_task", "TrackStar (mixed R)"
PUBLISHED = "TrackStar, plain R_task in the mix"


@dataclass(frozen=True)
class PublishedMix(TrackStar):
    """R = m R_task + (1 - m) R_train of plain second moments, as published; ours takes of queries what they share."""

    def curvature(self, task: SecondMoments, train: SecondMoments) -> list[Tensor]:
        """R of every block; the two spectra cross at one component in ``CROSSING``."""
        asked = task.means()
        trained = [shrunk(m, noise) for m, noise in zip(train.means(), train.noise(), strict=True)]
        weight = mixing_weight(asked, trained, sum(map(len, trained)) // CROSSING)
        return [weight * a_KK + (1 - weight) * t_KK for a_KK, t_KK in zip(asked, trained, strict=True)]


RECIPES: dict[str, tuple[str, Recipe]] = {
    DOT: ("none", GradDot()),
    UNIT: ("none", GradCos()),
    RAW_R: ("none", TrackStar()),
    CORRECTED: ("factored", TrackStar(train=False, task=False)),
    TASK: ("factored", TrackStar(train=False)),
    TRAIN: ("factored", TrackStar(task=False)),
    PUBLISHED: ("factored", PublishedMix()),
    MIXED: ("factored", TrackStar()),
}
K = 10


def rankings(found: Trained, known: Collection[str] = ()) -> dict[str, np.ndarray]:
    """Scores [Q, N] of every ranking but the known ones, examples in the order of the case's texts."""
    words = {name: told for name, told in lexical(found.case).items() if name not in known}
    return words | {name: scores(found, *how) for name, how in RECIPES.items() if name not in known}


def lexical(case: Case) -> dict[str, np.ndarray]:
    """Rankings that know words only."""
    texts, said = list(case.texts.values()), [p + a for p, a in zip(case.prompts, case.answers, strict=True)]
    known = {BM25: bm25_scores(said, texts), TFIDF: tfidf_scores(said, texts)}
    return known | ({KEYWORDS: bm25_scores(case.keywords, texts)} if case.keywords else {})


def scores(found: Trained, correction: str, recipe: Recipe) -> np.ndarray:
    """One recipe's scores [Q, N]."""
    influence = Analyzer(found.ledgers[correction], found.model).influence([found.behavior], recipe=recipe)
    at = {str(name): number for number, name in enumerate(influence.examples.ids)}
    return influence.scores[:, [at[name] for name in found.case.texts]]


def patched(found: Trained, compared: dict[str, np.ndarray]) -> TailPatch:
    """One step on each of the top examples, as training took it on average."""
    stage = next(s for s in Ledger(found.ledgers["factored"]).stages() if s.name == STAGE)
    rates = [np.mean(row["learning_rate"]) for row in stage.steps().select(["learning_rate"]).to_pylist()]
    step = PatchStep(
        learning_rate=float(np.mean(rates)) / found.case.training.batch, second_moments=stage.moments("end")
    )
    return tail_patch(found.model, found.behavior, found.examples, compared, step, k=K, together=False)
