"""Our methods on the testbeds: at their defaults, at smaller settings, and over several models; and two controls."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from torch import Tensor, nn

from lds_runs import chargpt, digits, digits_truth, prose
from lds_runs.adapters.task import CHARGPT, DIGITS, timed
from lds_runs.chargpt_model import WARMUP
from lds_runs.testbed import CONTROL, GIVEN, RECORDED, STAGE, Scored, Trained, Truth
from trainer_attrib import Analyzer, Examples
from trainer_attrib.analysis.recipes.gauss_newton import GaussNewton
from trainer_attrib.analysis.recipes.recipe import Recipe
from trainer_attrib.evaluation.adapters import scores_of
from trainer_attrib.evaluation.lexical import tfidf_scores

ROWS = ("grad_dot", "grad_cos", "tracin", "trackstar", "fisher")  # recipes that read what training left behind
DEFAULT, ENSEMBLE = "gauss_newton, default", "gauss_newton, default, 3 models"
SHORT, SHORT_TWO = "gauss_newton, rank 256, 2 states", "gauss_newton, rank 256, 2 states, 2 models"
EARLY_TWO = "gauss_newton, rank 256, early state, 2 models"
TFIDF, RANDOM = "tf-idf of characters", "random"
# Chosen by retrainings on halves of other text, not by the truth of this table (docs/log.md).
_EARLY = GaussNewton(rank=256, basis=128, sample=512, flattened=0.001, snapshots=("mid-1",))
_SHORT = replace(_EARLY, snapshots=("mid-1", "mid-2"))


@dataclass(frozen=True)
class Ours:
    """One setting of one recipe.

    Args:
        name: shown in the table.
        recipe: its name, for default settings, or an object.
        models: from as many seeds, whose scores are averaged.
    """

    name: str
    recipe: str | Recipe
    models: int = 1


@dataclass(frozen=True)
class Testbed:
    """A training, its truth and what is run on it.

    Args:
        name: shown in the table.
        kind: ``DIGITS`` or ``CHARGPT``.
        trained: seed and cache folder -> the recorded training.
        plainly: seed -> a model trained without recording.
        truth: cache folder and number of halves, or None for all -> retrainings.
        examples: of a training, with their losses.
        methods: that are given these.
        ensemble: how many models peers get that average over models.
        times: that each method is run; the least CPU time counts.
    """

    name: str
    kind: str
    trained: Callable[[int, Path], Trained]
    plainly: Callable[[int], nn.Module]
    truth: Callable[[Path, int | None], Truth]
    examples: Callable[[Trained], Examples]
    methods: tuple[Ours, ...]
    ensemble: int
    times: int

    def ours(self, cache: Path) -> Iterator[Scored]:
        """Every recipe, on recordings from the folder, and the controls."""
        runs = [self.trained(seed, cache) for seed in range(self._recorded())]
        for name in ROWS:
            yield self._scored(Ours(f"{name}, recorded rows", name), runs, None)
        for method in self.methods:
            yield self._scored(method, runs, self.examples)
        chance = np.random.default_rng(0).normal(size=(len(runs[0].behavior), len(runs[0].ids)))
        yield Scored(RANDOM, CONTROL, True, 0, chance, 0.0)
        if self.kind == CHARGPT:
            known, asked = ([prose.texts()[window] for window in part] for part in prose.split())
            scores, seconds = timed(lambda: tfidf_scores(asked, known), self.times)
            yield Scored(TFIDF, CONTROL, True, 0, np.asarray(scores), seconds / self._training())

    def weights(self, cache: Path) -> list[dict[str, Tensor]]:
        """Of models from several seeds, that of the first recording first; what was not recorded is trained here."""
        models = [
            self.trained(seed, cache).model if seed < self._recorded() else self.plainly(seed)
            for seed in range(self.ensemble)
        ]
        return [{name: value.detach().contiguous() for name, value in m.state_dict().items()} for m in models]

    def recording(self) -> float:
        """CPU time of a recorded training over that of a plain one."""
        with tempfile.TemporaryDirectory() as folder:
            fresh = iter(range(self.times))
            seconds = timed(lambda: self.trained(0, Path(folder, str(next(fresh)))), self.times)[1]
        return seconds / self._training()

    def _recorded(self) -> int:
        return max(method.models for method in self.methods)

    def _scored(self, method: Ours, runs: list[Trained], examples: Callable[[Trained], Examples] | None) -> Scored:
        chosen = runs[: method.models]
        scores, seconds = timed(
            lambda: np.mean([_scores(run, method.recipe, examples) for run in chosen], 0), self.times
        )
        kind, default = RECORDED if examples is None else GIVEN, isinstance(method.recipe, str)
        return Scored(method.name, kind, default, method.models, scores, seconds / self._training())

    def _training(self) -> float:
        return timed(lambda: self.plainly(0), self.times)[1]


def _scores(run: Trained, recipe: str | Recipe, examples: Callable[[Trained], Examples] | None) -> np.ndarray:
    data = {STAGE: examples(run)} if examples else None
    analyzer = Analyzer(run.ledger, run.model)
    return scores_of(analyzer.influence([run.behavior], recipe=recipe, data=data, controls=()), run.ids)


def _of_classes(run: Trained) -> Examples:
    return Examples.of_classes(run.train[0], run.train[1], ids=run.ids, batch_size=100)


def _digits(config: str) -> Testbed:
    return Testbed(
        f"digits {config}",
        DIGITS,
        lambda seed, cache: digits.trained(config, seed, cache),
        lambda seed: digits.train_plainly(config, seed).eval(),
        lambda cache, halves: digits_truth.ground_truth(config, "half", cache, halves=halves or digits_truth.HALVES),
        _of_classes,
        (
            Ours(DEFAULT, "gauss_newton"),
            Ours("gauss_newton, rank 16", GaussNewton(rank=16)),
            Ours("gauss_newton, end only", GaussNewton(snapshots=("end",))),
            Ours(ENSEMBLE, "gauss_newton", models=3),
        ),
        ensemble=10,
        times=3,
    )


def _chargpt(config: str) -> Testbed:
    return Testbed(
        config,
        CHARGPT,
        lambda seed, cache: chargpt.trained(config, seed, cache),
        lambda seed: chargpt.train_plainly(config, seed),
        lambda cache, halves: chargpt.ground_truth(config, cache, halves or chargpt.HALVES),
        chargpt.examples,
        (
            Ours(DEFAULT, "gauss_newton"),
            Ours(SHORT, _SHORT),
            Ours(EARLY_TWO, _EARLY, models=2),
            Ours(SHORT_TWO, _SHORT, models=2),
        ),
        ensemble=3,
        times=1,
    )


TESTBEDS = (_digits("sgdm"), _digits("adamw"), *map(_chargpt, WARMUP))
