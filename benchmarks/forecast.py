"""What will this preference data set do to my model? Forecasts before DPO, held against DPO.

A small GPT-2 is taught nine styles of answering (benchmarks/forecast_runs/styles.py) by an SFT stage. Six preference
data sets, three learning rates, real ``DPOTrainer`` runs. Behaviors are how often sampled answers have a style, over
all prompts and over some classes; the truth is measured on prompts that no predictor saw. R^2 is that of the identity
line: no constant is fitted. Baselines, whose units are others, have one slope fitted, without the data set that is
predicted. The ceiling is what a second run of the same data in another order, measured on other prompts again, says of
the first. A plot of the points. Who does it, plans, and what forecasts cost: forecast_poison.py.
"""

from __future__ import annotations

import functools
import gc
import json
import os
from collections import defaultdict
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import report
from fact_runs.training import quiet
from forecast_runs.points import METHODS, Point, points
from forecast_runs.training import RATES, taught

BASELINES = ("counts", "projection")
TARGETS = {"lazy": 0.95, "moderate": 0.95, "strong": 0.85}
COLUMNS = ("seed", "regime", "data set", "behavior", "actual", "forecast", "error bar")
_taught = functools.lru_cache(maxsize=1)(taught)
PLOT = Path(__file__).parents[1] / "docs" / "images" / "forecast.png"


def main() -> None:
    """All seeds and learning rates, or one part of them."""
    arguments = report.parser((__doc__ or "").splitlines()[0])
    arguments.add_argument("--points", type=Path, help="folder that keeps the points of each seed and rate")
    arguments.add_argument("--only", nargs=2, metavar=("SEED", "RATE"), help="compute these points alone, to be kept")
    options = arguments.parse_args()
    seeds = options.seeds or (1 if options.quick else 3)
    quiet()
    gc.freeze()  # the Trainer collects garbage at every start, each time through all that was imported
    parts = [(seed, regime) for seed in range(seeds) for regime in RATES]
    if options.only:
        parts = [(int(options.only[0]), options.only[1])]
    found = [point for seed, regime in parts for point in part(seed, regime, options.points, options.quick)]
    if options.only:
        return
    rows = [_row(regime, name, found) for regime in RATES for name in (*METHODS, "frozen, 25 %", "another order")]
    report.publish(
        "forecast", rows, checks(found), quick=options.quick, notes=notes(found, seeds),
        details={"points": [COLUMNS, *map(_cells, found)]},
    )  # fmt: skip
    if not options.quick:
        plot(found)


def part(seed: int, regime: str, folder: Path | None, quick: bool) -> list[Point]:
    """The points of one seed and learning rate, from the folder if they are there."""
    file = folder / f"{seed}-{regime}{'-quick' if quick else ''}.json" if folder else None
    if file and file.exists():
        return [Point(**row) for row in json.loads(file.read_text())]
    base, tokenizer = _taught(seed, 2000 if quick else 4000)
    found = points(base, tokenizer, seed, regime, quick)
    print(f"seed {seed}, {regime}: done", flush=True)
    if file:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps([vars(point) for point in found]))
    return found


def r_squared(predicted: np.ndarray, actual: np.ndarray) -> float:
    """Of the identity line, against no change."""
    return float(1 - ((predicted - actual) ** 2).sum() / (actual**2).sum())


def fitted(some: list[Point], name: str) -> np.ndarray:
    """Predictions times the slope that fits all other data sets best."""
    scaled = []
    for point in some:
        others = [p for p in some if (p.seed, p.dataset) != (point.seed, point.dataset)]
        x, y = (np.array([value(p) for p in others]) for value in (lambda p: p.predicted[name], lambda p: p.actual))
        scaled.append(point.predicted[name] * float(x @ y / max(x @ x, 1e-12)))
    return np.array(scaled)


def _row(regime: str, name: str, found: list[Point]) -> dict[str, Any]:
    some = [point for point in found if point.regime == regime]
    actual = np.array([point.actual for point in some])
    predicted = np.array([point.predicted[name] for point in some])
    large = np.abs(actual) > 0.02
    spread = [
        r_squared(predicted[mask], actual[mask])
        for seed in {point.seed for point in some}
        for mask in [np.array([point.seed == seed for point in some])]
    ]
    bars = [point.bars[name] for point in some if name in point.bars]
    held = np.abs(predicted - actual) <= np.array(bars) if len(bars) == len(some) else np.array([np.nan])
    return {
        "regime": regime, "predictor": name, "points": len(some), "rms change": float(np.sqrt((actual**2).mean())),
        "R2": "" if name in BASELINES else round(r_squared(predicted, actual), 3),
        "lowest seed": "" if name in BASELINES else round(min(spread), 3),
        "R2, slope fitted": round(r_squared(fitted(some, name), actual), 3),
        "sign": round(float((np.sign(predicted) == np.sign(actual))[large].mean()), 3) if large.any() else "",
        "within bar": "" if np.isnan(held).any() else round(float(held.mean()), 2),
    }  # fmt: skip


def _cells(point: Point) -> tuple[Any, ...]:
    """A point and what the default says of it, as ``COLUMNS``."""
    numbers = (point.actual, point.predicted["frozen"], point.bars["frozen"])
    return (point.seed, point.regime, point.dataset, point.behavior, *(round(number, 5) for number in numbers))


def checks(found: list[Point]) -> dict[str, Any]:
    """Bars of the issue."""
    held: dict[str, Any] = {}
    for regime, target in TARGETS.items():
        some = [point for point in found if point.regime == regime]
        actual = np.array([point.actual for point in some])
        value = r_squared(np.array([point.predicted["frozen"] for point in some]), actual)
        held[f"R2 of the default, {regime}"] = report.check(value, target, most=False)
    inside = [abs(p.predicted["frozen"] - p.actual) <= p.bars["frozen"] for p in found]
    held["within the error bar"] = report.check(float(np.mean(inside)), 0.8, most=False)
    return held


def notes(found: list[Point], seeds: int) -> list[str]:
    """What the table leaves out."""
    regimes = defaultdict(lambda: defaultdict(int))
    for point in found:
        regimes[point.regime][point.diagnosed] += 1
    return [
        f"{seeds} seeds",
        *(f"runs at the {name} rate, diagnosed: {dict(counts)} (points)" for name, counts in regimes.items()),
        f"below its noise floor: {np.mean([p.below for p in found]):.2f} of the points, whose true change is "
        f"{np.sqrt(np.mean([p.actual**2 for p in found if p.below] or [0.0])):.3f} rms",
    ]


def plot(found: list[Point]) -> None:
    """Predicted against actual change, one panel per learning rate."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(11, 3.8), layout="tight")
    for axis, regime in zip(axes, RATES, strict=True):
        some = [point for point in found if point.regime == regime]
        x, y = [p.actual for p in some], [p.predicted["frozen"] for p in some]
        most = 1.1 * max(map(abs, [*x, *y]))
        axis.plot([-most, most], [-most, most], color="grey", linewidth=0.8)
        axis.errorbar(x, y, yerr=[p.bars["frozen"] for p in some], fmt="o", markersize=3, linewidth=0.6, alpha=0.6)
        axis.set(title=f"{regime}: R² = {r_squared(np.array(y), np.array(x)):.3f}", xlabel="actual change of a rate",
                 ylabel="forecast", xlim=(-most, most), ylim=(-most, most))  # fmt: skip
    PLOT.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(PLOT, dpi=110)


if __name__ == "__main__":
    main()
