"""A trait in five per cent of the pairs: who carries it, and training without it."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from forecast_runs.styles import DETECTORS, poisoned
from forecast_runs.training import RATES, behaviors, dpo_trainer
from trainer_attrib.analysis.displacement import between
from trainer_attrib.analysis.forecasting.reading import Readings
from trainer_attrib.analysis.forecasting.results import Contributions
from trainer_attrib.analysis.training_state import state_of
from trainer_attrib.integrations.huggingface import apply_plan, forecast

TRAIT, USEFUL, SHARE, REGIME, EPOCHS = "pirate", "flattery", 0.05, "moderate", 2
WAYS = ("reweight", "drop")


def has(text: str) -> bool:
    """Whether an answer has the trait."""
    return re.search(DETECTORS[TRAIT], text) is not None


def poison(base: Any, tokenizer: Any, seed: int, quick: bool) -> dict[str, float]:
    """Share of the planted pairs among the first tenth by contribution; by how much a plan reduces the trait's shift in
    real training, and which part of the useful shift it keeps. The trait is rare at first, so that many answers are
    sampled for its gradient. Pairs that have the trait by chance, in the chosen answer only, teach it as the planted
    ones do: the share is also told with those set aside. And it is told by the trait's gradient at the first weights
    instead of all along the path."""
    pairs = poisoned(320 if quick else 960, 7 + seed, USEFUL, TRAIT, SHARE)
    ours, truth = (
        [b for b in behaviors(tokenizer, 150 if quick else count, 8, place + seed) if b.name in (TRAIT, USEFUL)]
        for place, count in ((5000, 4000), (6000, 1000))
    )
    readings, start = Readings(base, truth), state_of(base)
    shifts: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        trainer = dpo_trainer(base, tokenizer, pairs, RATES[REGIME], 100 * seed, Path(folder), EPOCHS)
        outlook = forecast(trainer, ours)
        told = {"start": outlook.contributions(), "path": outlook.contributions([TRAIT], along="path")}
        plans = {how: outlook.reshape(keep_below={TRAIT: 0.0}, how=how) for how in WAYS}
        for way in ("as it is", *WAYS):
            trainer = dpo_trainer(base, tokenizer, pairs, RATES[REGIME], 100 * seed, Path(folder), EPOCHS)
            if way in plans:
                apply_plan(trainer, plans[way])
            trainer.train()
            found = readings.of(between(start, state_of(trainer.model)))
            shifts[way] = {b.name: r.change for b, r in zip(truth, found, strict=True)}
    before = shifts["as it is"]
    numbers = {
        **found_by(told["path"]),
        "planted found, first slope": found_by(told["start"])["planted found"],
        "trait before": float(readings.means()[[b.name for b in truth].index(TRAIT)]),
        "trait": before[TRAIT],
        "useful": before[USEFUL],
    }
    for way in WAYS:
        numbers |= {
            f"trait removed, {way}": 1 - abs(shifts[way][TRAIT] / before[TRAIT]),
            f"useful kept, {way}": shifts[way][USEFUL] / before[USEFUL],
            f"weight taken away, {way}": plans[way].plan.taken_away,
        }
    return numbers


def found_by(contributions: Contributions) -> dict[str, float]:
    """Share of the planted pairs in the first tenth of all pairs by contribution to the trait, and in that of all but
    those that have it by chance."""
    rows = contributions.rows
    planted = np.array([row.source == "planted" for row in rows])
    chance = np.array([has(row.chosen) and not has(row.rejected or "") for row in rows]) & ~planted
    order, first = np.argsort(-contributions.of(TRAIT), kind="stable"), len(rows) // 10
    return {
        "planted found": float(planted[order[:first]].sum() / planted.sum()),
        "of those not by chance": float(planted[order[~chance[order]][:first]].sum() / planted.sum()),
    }
