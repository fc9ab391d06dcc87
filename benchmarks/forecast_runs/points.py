"""Forecasts of DPO runs and what the runs then did."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from forecast_runs.styles import datasets, generated
from forecast_runs.training import RATES, behaviors, dpo_trainer, preference, untaught
from trainer_attrib import Behavior
from trainer_attrib.analysis.displacement import Displacement, between
from trainer_attrib.analysis.effects.slopes import inner
from trainer_attrib.analysis.forecasting.prediction import Prediction, View
from trainer_attrib.analysis.forecasting.predictors import GradientDot
from trainer_attrib.analysis.forecasting.reading import Reading, Readings
from trainer_attrib.analysis.training_state import state_of
from trainer_attrib.integrations.huggingface import forecast

METHODS = ("frozen", "warm", "linearised", "look_ahead", "gradient", "counts", "projection")
QUARTER, ORDER = "frozen, 25 %", "another order"
RUN, TURNS = "the run", 3


class SlopesKept(GradientDot):
    """The predictor "gradient", that differentiates behaviors of one base once for all of its runs."""

    def __init__(self) -> None:
        self._known: dict[str, Displacement] = {}

    def predict(self, view: View) -> Prediction:
        """See ``GradientDot``."""
        for number, behavior in enumerate(view.behaviors):
            if behavior.name not in self._known:
                self._known[behavior.name] = view.slope(number)
        dots = [float(inner(self._known[behavior.name], view.gradients.warm)) for behavior in view.behaviors]
        return Prediction([Reading(dot, 0.0, "linear") for dot in dots], None, view.gradients.share)


@dataclass
class Point:
    """One behavior after one run."""

    seed: int
    regime: str
    dataset: str
    behavior: str
    actual: float
    predicted: dict[str, float]
    bars: dict[str, float]
    diagnosed: str
    below: bool


def points(base: Any, tokenizer: Any, seed: int, regime: str, quick: bool) -> list[Point]:
    """All data sets at one learning rate. Three sets of prompts: the predictors', the truth's, and those on which a
    second run in another order is measured."""
    count, asked = (160, 150) if quick else (480, 500)
    ours, truth, again = (behaviors(tokenizer, asked, 4, 1000 * place + seed) for place in (1, 2, 3))
    readings, start = [Readings(base, truth), Readings(base, again)], state_of(base)
    slopes, found = SlopesKept(), []
    methods = [slopes if method == slopes.name else method for method in METHODS]
    sets = list(datasets(count, seed).items())
    for name, pairs in sets[:2] if quick else sets:
        with tempfile.TemporaryDirectory() as folder:
            actual = []
            for order in (0, 1):
                trainer = dpo_trainer(base, tokenizer, pairs, RATES[regime], 100 * seed + order, Path(folder))
                if order == 0:
                    outlook, quarter = forecast(trainer, ours, methods), forecast(trainer, ours, share=0.25)
                trainer.train()
                actual.append(readings[order].of(between(start, state_of(trainer.model))))
        found += [
            _point(seed, regime, name, behavior, outlook, quarter, [side[number].change for side in actual])
            for number, behavior in enumerate(ours)
        ]
    return found


def _point(
    seed: int, regime: str, name: str, behavior: Behavior, outlook: Any, quarter: Any, actual: list[float]
) -> Point:  # fmt: skip
    rows = {row.method: row for row in outlook.rows if row.behavior == behavior.name}
    few = quarter.of(behavior.name)
    predicted = {method: row.predicted for method, row in rows.items()} | {QUARTER: few.predicted, ORDER: actual[1]}
    bars = {method: row.error_bar for method, row in rows.items() if row.error_bar == row.error_bar}
    first = rows["frozen"]
    return Point(
        seed, regime, name, behavior.name, actual[0], predicted, bars | {QUARTER: few.error_bar}, first.regime,
        not first.above_noise,
    )  # fmt: skip


def costs(quick: bool) -> dict[str, float]:
    """CPU time of forecasts as a share of that of the run: of a behavior that is computed, and of rates of sampled
    answers, whose sampling costs what it costs however long the run is. The forecast from a quarter and the run take
    turns, and medians are told: another process's work beside one of them would be taken for a difference."""
    base, tokenizer = untaught(0)
    turns = [_turn(base, tokenizer, quick, also=number == 0) for number in range(1 if quick else TURNS)]
    middle = {name: median(turn[name] for turn in turns if name in turn) for name in turns[0]}
    run = middle.pop(RUN)
    return {name: seconds / run for name, seconds in middle.items()}


def _turn(base: Any, tokenizer: Any, quick: bool, also: bool) -> dict[str, float]:
    """CPU seconds of a run and of forecasts of it: from a quarter, and of the other kinds if asked for."""
    pairs, epochs = generated(160 if quick else 1440, 77, {"flattery": 0.4, "list": 0.3}), 1 if quick else 2
    prefers, rates = [preference(tokenizer, "flattery", 32, 9)], behaviors(tokenizer, 100, 4, 9)
    with tempfile.TemporaryDirectory() as folder:
        trainer = dpo_trainer(base, tokenizer, pairs, RATES["moderate"], 0, Path(folder), epochs)
        works: dict[str, Callable[[], Any]] = {"forecast from 25 %": lambda: forecast(trainer, prefers, share=0.25)}
        if also:
            works |= {
                "forecast from 25 %, 13 rates of 400 sampled answers": lambda: forecast(trainer, rates, share=0.25),
                "forecast from all batches": lambda: forecast(trainer, prefers),
            }
        return {name: _seconds(work) for name, work in (works | {RUN: trainer.train}).items()}


def _seconds(work: Callable[[], Any]) -> float:
    began = time.process_time()
    work()
    return time.process_time() - began
