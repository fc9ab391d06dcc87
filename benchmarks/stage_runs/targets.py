"""What must hold, as the checks of the report. A target of a method that was not run is left out."""

from __future__ import annotations

from typing import Any

import report

from stage_runs.contenders import AUTO, BUDGET, CONTENDERS, EXACT, REPLAY
from stage_runs.regimes import REGIMES
from trainer_attrib.analysis.effects.auto import LADDER

Row = dict[str, Any]
NO_BARS = ("change", "random", "noise floor", EXACT)


def checks_of(table: list[Row], exact: bool) -> dict[str, Any]:
    """Every target whose rows are in the table."""
    found = {(row["regime"], row["method"]): row for row in table}
    checks = {"trainings_that_do_not_run_again_exactly": report.check(0 if exact else 1, 0)}
    for regime in REGIMES:
        adaptive, classifier = regime.optimizer == "AdamW", regime.pipeline == "classifier"
        at = {method: row for (name, method), row in found.items() if name == regime.name}
        if EXACT in at:
            label = f"{regime.name}: error of a replay of every step"
            checks[label] = report.check(at[EXACT]["rel. error"], 0.0)
        if REPLAY in at and adaptive:
            checks |= _held(at[REPLAY], 0.20, 0.25)
        if "shadow" in at and classifier:
            checks |= _held(at["shadow"], 0.30, 0.25)
        if "propagate" in at and regime.later == "gentle":
            checks |= _held(at["propagate"], 0.20, 0.05)
        if AUTO in at and (best := _best(at)) is not None:
            ratio = at[AUTO]["rel. error"] / best if best > 0 else 1.0
            checks[f"{regime.name}: auto's error over the best affordable rung's"] = report.check(ratio, 1.5)
    for (regime, method), row in found.items():
        if regime == "all" and method not in NO_BARS:
            checks[f"{method}: spearman of bars and errors"] = report.check(row["bar spearman"], 0.8, most=False)
            checks[f"{method}: the same of cells"] = report.check(row["of cells"], 0.8, most=False)
            checks[f"{method}: errors within their bars"] = report.check(row["covered"], 0.8, most=False)
    return checks


def _held(row: Row, error: float, cost: float) -> dict[str, Any]:
    place = f"{row['regime']}: {row['method']}"
    return {
        f"{place}, pearson": report.check(row["pearson"], 0.95, most=False),
        f"{place}, rel. error": report.check(row["rel. error"], error),
        f"{place}, cost": report.check(row["cost"], cost),
    }


def _best(at: dict[str, Row]) -> float | None:
    """The smallest error among the ladder's rungs that auto could have paid for."""
    rungs = [name for name, method in CONTENDERS.items() if method in LADDER and name in at]
    return min((at[name]["rel. error"] for name in rungs if at[name]["cost"] <= BUDGET), default=None)
