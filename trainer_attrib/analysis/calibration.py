"""Which states of the model to trust: weights of a correction, fitted on examples known to be responsible.

Whether the base model's influence is a bias or the best signal there is depends on the task (docs/log.md). A handful of
canaries tells: errors whose examples are known, because they were planted or found by hand. Everything is judged on
kinds of canaries that it was not fitted on.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from trainer_attrib.analysis.behavior import Behavior
from trainer_attrib.analysis.recipes.at_states import StateScores, recorded_states, score_at_states
from trainer_attrib.analysis.recipes.dda import BASE, Dda
from trainer_attrib.analysis.recipes.recipe import Question, Recipe
from trainer_attrib.analysis.results import Result
from trainer_attrib.analysis.tables import aligned, bars_of, require_matplotlib
from trainer_attrib.errors import ConfigurationError
from trainer_attrib.evaluation.detection import average_precision
from trainer_attrib.ledger.reader import StageReader
from trainer_attrib.report.blocks import Block, Grid, Notes

BETAS = (0.25, 1.0)
SURE = 2.0
"""Standard errors by which a gain must be above 0 to be used, or below it to refuse."""
RIDGE = 0.1
"""Of the mean variance: pulls fitted weights towards the plain difference of means."""


@dataclass(frozen=True)
class Canaries:
    """Errors of which it is known what taught them.

    Args:
        behavior: increases with the errors, one query each; of the same form as the questions to come.
        responsible: ids of the examples that taught each.
        kinds: of the queries, such as which fact or swap; at least two different ones. Each query its own by default.

    Raises:
        ConfigurationError: columns of different lengths, a query without examples, or a single kind.
    """

    behavior: Behavior
    responsible: Sequence[Collection[str]]
    kinds: Sequence[str] = ()

    def __post_init__(self) -> None:
        count = len(self.behavior)
        if not self.kinds:
            object.__setattr__(self, "kinds", self.behavior.queries)
        if {len(self.responsible), len(self.kinds)} != {count} or not all(self.responsible):
            raise ConfigurationError(
                f"Canaries got {count} queries, {len(self.responsible)} sets of responsible examples and "
                f"{len(self.kinds)} kinds.",
                fix="pass one of each per query, and at least one responsible example for each.",
            )
        if len(set(self.kinds)) < 2:
            raise ConfigurationError(
                "All canaries are of one kind.",
                cause="weights have to be judged on another kind than they were fitted on.",
                fix="plant or mark canaries of a second kind (another fact, another swap).",
            )


@dataclass(frozen=True)
class Candidate:
    """A correction on canaries of kinds that it was not fitted on.

    ``precision`` is the mean average precision, ``gain`` what it has above denoising alone, with its standard error
    over kinds. ``weights`` are those of the states, fitted on all canaries.
    """

    name: str
    weights: Mapping[str, float]
    precision: float
    gain: float
    standard_error: float

    @property
    def helps(self) -> bool:
        """Beyond the noise."""
        return self.gain > SURE * self.standard_error

    @property
    def hurts(self) -> bool:
        """Beyond the noise."""
        return self.gain < -SURE * self.standard_error


@dataclass(frozen=True, repr=False)
class Calibration(Result):
    """What corrections do on canaries, and the recipe to use: the best one that helps beyond the noise, else denoising
    alone."""

    stage: str
    base: Recipe
    candidates: tuple[Candidate, ...]
    queries: int
    kinds: int
    caveats: tuple[str, ...] = ()

    @property
    def chosen(self) -> Candidate:
        """The candidate to use; the first, denoising alone, where none helps."""
        helping = [candidate for candidate in self.candidates[1:] if candidate.helps]
        return max(helping, key=lambda candidate: candidate.precision, default=self.candidates[0])

    @property
    def recipe(self) -> Dda:
        """To be asked with."""
        return Dda(self.base, 0.0, self.chosen.weights)

    def debias(self, beta: float) -> Dda:
        """The recipe that takes out ``beta`` times the base model's scores.

        Raises:
            ConfigurationError: it was not tried, or canaries say that it hurts.
        """
        found = next((c for c in self.candidates if c.name == _debiased(beta)), None)
        if found is None:
            raise ConfigurationError(
                f"Debiasing by {beta:g} was not tried; candidates are {[c.name for c in self.candidates]}.",
                fix=f"analyzer.calibrate(..., betas=({beta:g},)).",
            )
        if found.hurts:
            raise ConfigurationError(
                f"Debiasing by {beta:g} is refused: on canaries it lowers average precision by {-found.gain:.3f} "
                f"+- {found.standard_error:.3f}.",
                cause="the model before the stage already points at the responsible examples; taking that out deletes "
                "the signal.",
                fix="use `calibration.recipe`, or Dda(beta=...) at your own risk.",
            )
        return Dda(self.base, beta)

    def to_table(self) -> pa.Table:
        """Columns candidate, chosen, average_precision, gain, standard_error, weights."""
        rows = [
            {
                "candidate": c.name, "chosen": c is self.chosen, "average_precision": c.precision, "gain": c.gain,
                "standard_error": c.standard_error, "weights": _shown(c.weights),
            }
            for c in self.candidates
        ]  # fmt: skip
        return pa.Table.from_pylist(rows)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        about = {"stage": self.stage, "recipe": self.base.name, "queries": self.queries, "kinds": self.kinds}
        return {**about, "candidates": self.to_table().to_pylist(), "caveats": list(self.caveats)}

    def blocks(self) -> list[Block]:
        """The table and the caveats."""
        rows = [tuple(row.values()) for row in self.to_table().to_pylist()]
        note = f"{self.queries} canaries of {self.kinds} kinds; each kind is judged by what was fitted on the others."
        columns = ("correction", "chosen", "average precision", "gain", "standard error", "weights")
        return [Grid(f"Corrections of stage {self.stage}", columns, rows, note), Notes("Caveats", self.caveats)]

    def plot(self) -> Any:
        """A matplotlib figure: gains with two standard errors. Needs the extra ``plot``."""
        figure, axis = require_matplotlib().subplots(figsize=(7, 3), layout="tight")
        errors = [SURE * c.standard_error for c in self.candidates]
        bars_of(axis, [c.name for c in self.candidates], [c.gain for c in self.candidates], errors)
        axis.set(xlabel="average precision on canaries, above denoising alone")
        return figure

    def __repr__(self) -> str:
        rows = [
            (
                c.name, f"{c.precision:.3f}", f"{c.gain:+.3f} +- {c.standard_error:.3f}",
                "chosen" if c is self.chosen else "hurts" if c.hurts else "", _shown(c.weights),
            )
            for c in self.candidates
        ]  # fmt: skip
        return aligned(("correction", "average precision", "gain", "", "weights"), rows, self.caveats)


def calibrate(
    question: Question, stage: StageReader, canaries: Canaries, recipe: Recipe, betas: Sequence[float] = BETAS
) -> Calibration:
    """Fit and judge corrections of a recipe on canaries.

    Args:
        question: whose behaviors are those of the canaries.
        stage: that taught them.
        canaries: what taught what.
        recipe: to be corrected; for a ``Dda`` the recipe it corrects.
        betas: of the base model's scores to try taking out.

    Raises:
        ConfigurationError: responsible examples that were not scored, or no recorded states.
        AnalysisError: something is missing that the recipe needs.
    """
    base = recipe.recipe if isinstance(recipe, Dda) else recipe
    found = score_at_states(base, question, stage, recorded_states(stage))
    return judged(found, canaries, stage.name, base, betas)


def judged(
    found: StateScores, canaries: Canaries, stage: str, base: Recipe, betas: Sequence[float] = BETAS
) -> Calibration:
    """The calibration from scores at states that are known already; see :func:`calibrate`."""
    bad_QN = _marked(found, canaries)
    later = [name for name in found.names if name != BASE]
    if not later:
        raise ConfigurationError(
            f"Stage '{stage}' has no recorded state after its start.", fix="record snapshots, or make passes."
        )
    uniform = {name: 1 / len(later) for name in later}
    fixed: dict[str, dict[str, float]] = {"denoised": uniform, f"{later[-1]} alone": {later[-1]: 1.0}}
    if BASE in found.names:
        fixed |= {_debiased(beta): {**uniform, BASE: -beta} for beta in betas}
        fixed |= {f"{BASE} alone": {BASE: 1.0}}
    precisions = {name: _precisions(found, weights, bad_QN) for name, weights in fixed.items()}
    kinds_Q = np.asarray(canaries.kinds, dtype=object)
    held_Q = np.zeros(len(kinds_Q))
    for kind in dict.fromkeys(canaries.kinds):
        out = kinds_Q == kind
        held_Q[out] = _precisions(found, _fitted(found, bad_QN, ~out), bad_QN)[out]
    precisions["fitted"] = held_Q
    weights = {**fixed, "fitted": _fitted(found, bad_QN, np.ones(len(kinds_Q), bool))}
    told = [_candidate(name, weights[name], p, precisions["denoised"], kinds_Q) for name, p in precisions.items()]
    kinds = len(set(canaries.kinds))
    return Calibration(stage, base, tuple(told), len(kinds_Q), kinds, (*found.caveats, *_said(told, kinds)))


def _marked(found: StateScores, canaries: Canaries) -> np.ndarray:
    ids = found.examples.ids.astype(str)
    bad_QN = np.array([np.isin(ids, [str(example) for example in some]) for some in canaries.responsible])
    if empty := np.flatnonzero(~bad_QN.any(1)).tolist():
        raise ConfigurationError(
            f"None of the responsible examples of canaries {empty[:5]} was scored.",
            cause=f"ids differ from those of the stage, such as {ids[:3].tolist()}, or were not sketched.",
            fix="pass the ids under which the stage was trained on them.",
        )
    return bad_QN


def _precisions(found: StateScores, weights: Mapping[str, float], bad_QN: np.ndarray) -> np.ndarray:
    """Average precision of each query, [Q]; examples without scores come last."""
    sums_QN = Dda(weights=weights, beta=0.0).combine(found)
    lowest = np.nanmin(sums_QN) - 1
    return np.array([average_precision(np.nan_to_num(s, nan=lowest), b) for s, b in zip(sums_QN, bad_QN, strict=True)])


def _fitted(found: StateScores, bad_QN: np.ndarray, on_Q: np.ndarray) -> dict[str, float]:
    """Fisher's linear discriminant of responsible examples against the others, over the states' scores (Fisher 1936);
    absolute weights sum to 1."""
    points_PS = np.nan_to_num(found.scores[:, on_Q].reshape(len(found.names), -1).T)
    bad_P = bad_QN[on_Q].ravel()
    apart_S = points_PS[bad_P].mean(0) - points_PS[~bad_P].mean(0)
    within_PS = np.concatenate([points_PS[part] - points_PS[part].mean(0) for part in (bad_P, ~bad_P)])
    spread_SS = within_PS.T @ within_PS / len(within_PS)
    spread_SS += RIDGE * np.trace(spread_SS) / len(spread_SS) * np.eye(len(spread_SS))
    weights_S = np.linalg.solve(spread_SS, apart_S)
    weights_S /= np.abs(weights_S).sum() or 1.0
    return dict(zip(found.names, weights_S.tolist(), strict=True))


def _candidate(
    name: str, weights: Mapping[str, float], precisions_Q: np.ndarray, plain_Q: np.ndarray, kinds_Q: np.ndarray
) -> Candidate:
    gains = np.array([(precisions_Q - plain_Q)[kinds_Q == kind].mean() for kind in dict.fromkeys(kinds_Q)])
    error = float(gains.std(ddof=1) / len(gains) ** 0.5)
    return Candidate(name, weights, float(precisions_Q.mean()), float(gains.mean()), error)


def _said(candidates: Sequence[Candidate], kinds: int) -> list[str]:
    said = [f"{c.name}: hurts on canaries and is refused" for c in candidates if c.hurts]
    if kinds < 4:
        said.append(f"standard errors are over {kinds} kinds of canaries, too few to trust small gains")
    return said


def _debiased(beta: float) -> str:
    return f"debiased, beta {beta:g}"


def _shown(weights: Mapping[str, float]) -> str:
    return "  ".join(f"{weight:+.2f} {name}" for name, weight in weights.items())
