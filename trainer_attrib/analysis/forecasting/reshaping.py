"""Changing a data set so that a run does not do what it would do."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from trainer_attrib.analysis.forecasting.plan import Plan
from trainer_attrib.analysis.forecasting.planning import Wish, planned
from trainer_attrib.analysis.forecasting.prediction import View
from trainer_attrib.analysis.forecasting.results import Contributions, Shifts
from trainer_attrib.analysis.results import Result
from trainer_attrib.analysis.tables import aligned
from trainer_attrib.errors import ConfigurationError
from trainer_attrib.report.blocks import Bar, Bars, Block, Grid, Notes

CORRECTIONS, NEAR = 3, 0.1
"""How often a plan is corrected by its own forecast, and by which share of the first shift it may miss."""
WAYS = ("reweight", "drop", "flip", "offset", "mask")


@dataclass(frozen=True, repr=False)
class Reshaping(Result):
    """A plan for the data, and the forecasts without it and with it.

    ``trainer_attrib.integrations.huggingface.apply_plan`` makes a trainer follow the plan.
    """

    plan: Plan
    how: str
    before: Shifts
    after: Shifts
    caveats: tuple[str, ...] = ()

    def columns(self, dataset: Any, id_column: str = "id") -> Any:
        """The data set with the plan as columns: plan_weight, plan_offset, plan_flip, plan_mask. No row is left out, so
        that the plan can be read and changed; ``apply_plan`` of the integrations follows it.

        Args:
            dataset: of Hugging Face ``datasets``, or a list of dicts.
            id_column: that names its rows; a row without it is called by its number.

        Raises:
            MissingDataError: the data set has other rows than the forecast run.
        """
        columns = self.plan.columns(dataset, id_column)
        if hasattr(dataset, "add_column"):
            for name, values in columns.items():
                dataset = dataset.add_column(name, values)
            return dataset
        return [{**row, **{name: columns[name][number] for name in columns}} for number, row in enumerate(dataset)]

    def write(self, folder: str | os.PathLike[str], dataset: Any, id_column: str = "id") -> Path:
        """Write the data set with the plan as columns, as ``datasets.load_from_disk`` reads it; returns the folder,
        which is there as a whole or not at all.

        Args:
            folder: new.
            dataset: see :meth:`columns`.
            id_column: see :meth:`columns`.

        Raises:
            ConfigurationError: the folder exists or cannot be written.
            MissingDataError: the data set has other rows than the forecast run.
            MissingExtraError: the package ``datasets`` is not installed.
        """
        write = importlib.import_module("trainer_attrib.integrations.cleaned_data").write_rows
        return write(folder, self.columns(dataset, id_column))

    def to_table(self) -> pa.Table:
        """Columns example, weight, offset, flipped, masked (number of tokens)."""
        plan = self.plan
        masked = [sum(map(len, plan.masked.get(number, ((), ())))) for number in range(len(plan.ids))]
        return pa.table({
            "example": list(plan.ids), "weight": plan.weights, "offset": plan.offsets, "flipped": plan.flipped,
            "masked": masked,
        })  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        told = {"how": self.how, "taken_away": self.plan.taken_away, "dropped": int(self.plan.dropped.sum())}
        return {**told, "before": self.before.to_dict(), "after": self.after.to_dict(), "caveats": list(self.caveats)}

    def blocks(self) -> list[Block]:
        """Predicted changes without and with the plan, what it does, the caveats."""
        both = (("as it is", self.before), ("reshaped", self.after))
        bars = [Bar(r.behavior, label, r.predicted, r.error_bar) for label, shifts in both for r in shifts.rows]
        return [
            Bars("Forecast with and without the plan", bars),
            Grid("The plan", ("", ""), [(key, value) for key, value in self._facts()]),
            Notes("What to keep in mind", [*self.caveats, *self.after.caveats]),
        ]

    def plot(self) -> Any:
        """A matplotlib figure of the reshaped forecast. Needs the extra ``plot``."""
        return self.after.plot()

    def __repr__(self) -> str:
        pairs = [(row, self.after.of(row.behavior)) for row in self.before.rows]
        cells = [
            (
                old.behavior,
                f"{old.predicted:+.4f} ± {old.error_bar:.4f}",
                f"{new.predicted:+.4f} ± {new.error_bar:.4f}",
                "",
            )
            for old, new in pairs
        ]
        facts = "; ".join(f"{key}: {value}" for key, value in self._facts())
        return aligned(("behavior", "as it is", "reshaped", ""), cells, [facts, *self.caveats])

    def _facts(self) -> list[tuple[str, object]]:
        plan = self.plan
        return [
            ("how", self.how), ("examples", len(plan.ids)), ("weight taken away", f"{plan.taken_away:.1%}"),
            ("left out", int(plan.dropped.sum())), ("flipped", int(plan.flipped.sum())), ("masked", len(plan.masked)),
        ]  # fmt: skip


def reshape(
    view: View,
    found: Contributions,
    wish: Wish,
    how: str,
    predicted: Mapping[str, float],
    before: Shifts,
    again: Callable[[Plan], Shifts],
) -> Reshaping:
    """Make a plan and forecast under it; see :meth:`~trainer_attrib.analysis.forecasting.forecast.Forecast.reshape`.

    Optimizers of Adam's kind do not see the size of gradients: what the plan takes away from all of them alike comes
    back, and first-order plans fall short. Where the forecast under a plan misses, the plan aims further by as much.

    Raises:
        ConfigurationError: an unknown way.
    """
    if how not in WAYS:
        raise ConfigurationError(f"Unknown way {how!r} to reshape data.", fix=f"use one of {list(WAYS)}.")
    scaled = _scaled(found, predicted)
    aim, tried = wish, list[tuple[Plan, Shifts, dict[str, float], list[str]]]()
    for _ in range(1 + CORRECTIONS):
        plan, caveats = planned(view, found, scaled, aim, how)
        if tried and plan.dropped.all():
            break  # nothing is left to be trained on: further in this direction there is no plan
        after = again(plan)
        missed = wish.missed({name: after.of(name).predicted for name in found.behaviors})
        tried.append((plan, after, missed, caveats))
        if all(miss <= NEAR * abs(predicted[name]) for name, miss in missed.items()):
            break
        aim = aim.tightened(missed)
    plan, after, missed, caveats = min(tried, key=lambda one: sum(one[2].values()))
    said = [
        f"'{name}' is forecast at {after.of(name).predicted:+.4f}, {miss:.4f} from what was asked for"
        for name, miss in missed.items()
        if miss > after.of(name).error_bar
    ]
    said += [
        f"'{name}' is protected, but forecast at {after.of(name).predicted:+.4f} where it was {predicted[name]:+.4f}"
        for name in wish.protected
        if abs(after.of(name).predicted - predicted[name]) > after.of(name).error_bar
    ]
    return Reshaping(plan, how, before, after, (*caveats, *said))


def _scaled(found: Contributions, predicted: Mapping[str, float]) -> np.ndarray:
    """Contributions in units of the measured prediction, where that is not far from the linear one. [K, N]"""
    rows = []
    for name, values in zip(found.behaviors, found.values, strict=True):
        ratio = predicted[name] / values.sum() if values.sum() else 1.0
        rows.append(values * (ratio if 1 / 3 < ratio < 3 else 1.0))
    return np.array(rows)
