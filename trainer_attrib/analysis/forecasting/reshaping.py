"""Changing a data set so that a run does not do what it would do."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from trainer_attrib.analysis.forecasting.masking import masked_tokens
from trainer_attrib.analysis.forecasting.plan import Plan
from trainer_attrib.analysis.forecasting.prediction import View
from trainer_attrib.analysis.forecasting.results import Contributions, Shifts
from trainer_attrib.analysis.results import Result
from trainer_attrib.analysis.tables import aligned
from trainer_attrib.errors import ConfigurationError
from trainer_attrib.numerics.reweighting import Bounds, least_change
from trainer_attrib.report.blocks import Bar, Bars, Block, Grid, Notes

HALVINGS = 30
CORRECTIONS, NEAR = 3, 0.1
"""How often a plan is corrected by its own forecast, and by which share of the first shift it may miss."""
WAYS = ("reweight", "drop", "flip", "offset", "mask")


@dataclass(frozen=True)
class Wish:
    """What the predicted changes should be.

    Args:
        below: behavior -> largest.
        above: behavior -> smallest.
        protected: behaviors whose change must stay.
        drop_at_most: largest share of the data's weight that may be taken away.
    """

    below: Mapping[str, float]
    above: Mapping[str, float]
    protected: tuple[str, ...]
    drop_at_most: float

    def missed(self, predicted: Mapping[str, float]) -> dict[str, float]:
        """By how much predictions are on the wrong side of each bound, at least 0."""
        over = {name: max(0.0, predicted[name] - bound) for name, bound in self.below.items()}
        return over | {name: max(0.0, bound - predicted[name]) for name, bound in self.above.items()}

    def tightened(self, missed: Mapping[str, float]) -> Wish:
        """Bounds that lie further by what was missed."""
        return replace(
            self,
            below={name: bound - missed[name] for name, bound in self.below.items()},
            above={name: bound + missed[name] for name, bound in self.above.items()},
        )

    @staticmethod
    def of(
        names: Sequence[str], below: Mapping[str, float], above: Mapping[str, float], protect: Sequence[str] | None,
        drop_at_most: float,
    ) -> Wish:  # fmt: skip
        """Checked.

        Raises:
            ConfigurationError: unknown behaviors, a share outside [0, 1], or nothing is asked for.
        """
        asked = [*below, *above, *(protect or ())]
        if unknown := sorted(set(asked) - set(names)):
            raise ConfigurationError(f"The forecast has no behaviors {unknown}.", fix=f"choose among {list(names)}.")
        if not 0 <= drop_at_most <= 1 or not (below or above):
            raise ConfigurationError(
                f"keep_below={dict(below)}, keep_above={dict(above)}, drop_at_most={drop_at_most}",
                fix="ask for at least one behavior, and for a share in [0, 1].",
            )
        kept = tuple(n for n in (names if protect is None else protect) if n not in below and n not in above)
        return Wish(below, above, kept, drop_at_most)


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
        plan, caveats = _plan(view, found, scaled, aim, how)
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
    return Reshaping(plan, how, before, after, (*caveats, *said))


def _scaled(found: Contributions, predicted: Mapping[str, float]) -> np.ndarray:
    """Contributions in units of the measured prediction, where that is not far from the linear one. [K, N]"""
    rows = []
    for name, values in zip(found.behaviors, found.values, strict=True):
        ratio = predicted[name] / values.sum() if values.sum() else 1.0
        rows.append(values * (ratio if 1 / 3 < ratio < 3 else 1.0))
    return np.array(rows)


def _plan(view: View, found: Contributions, values_KN: np.ndarray, wish: Wish, how: str) -> tuple[Plan, list[str]]:
    ids = [row.id for row in found.rows]
    if how == "reweight":
        return _reweighted(ids, list(found.behaviors), values_KN, wish)
    excess_N, needed = _excess(list(found.behaviors), values_KN, wish)
    if how == "offset":
        return _offset(ids, excess_N, needed, wish)
    order = np.argsort(-excess_N, kind="stable")
    gains = np.cumsum(excess_N[order] * (2 if how == "flip" else 1))
    useful = int((excess_N > 0).sum())
    count = min(int(np.searchsorted(gains, needed)) + 1 if needed > 0 else 0, useful, int(wish.drop_at_most * len(ids)))
    chosen = order[:count]
    reached = count == 0 or gains[count - 1] >= needed - 1e-12
    said = [] if reached else [f"{how} reaches {gains[count - 1] / needed:.0%} of what was asked within its limits"]
    if how == "drop":
        weights = np.ones(len(ids))
        weights[chosen] = 0
        return Plan.keeping(ids, weights=weights), said
    if how == "flip":
        flipped = np.zeros(len(ids), bool)
        flipped[chosen] = True
        return Plan.keeping(ids, flipped=flipped), said
    return Plan.keeping(ids, masked=masked_tokens(view, _direction(view, found, wish), chosen.tolist())), said


def _direction(view: View, found: Contributions, wish: Wish) -> dict[str, torch.Tensor]:
    """Towards more of what should become less, in the optimizer's metric."""
    metric = view.gradients.metric
    total = {name: torch.zeros_like(value) for name, value in metric.items()}
    names = [behavior.name for behavior in view.behaviors]
    for bounds, sign in ((wish.below, 1.0), (wish.above, -1.0)):
        for behavior in bounds:
            slope = view.slope(names.index(behavior))
            total = {name: total[name] + sign * metric[name] * slope[name] for name in total}
    return total


def _excess(names: list[str], values_KN: np.ndarray, wish: Wish) -> tuple[np.ndarray, float]:
    """How much each example pushes past the bounds, all bounds that are broken together, and by how much they are."""
    excess_N, needed = np.zeros(values_KN.shape[1]), 0.0
    for bounds, sign in ((wish.below, 1.0), (wish.above, -1.0)):
        for name, bound in bounds.items():
            values_N = sign * values_KN[names.index(name)]
            over = values_N.sum() - sign * bound
            if over > 0:
                excess_N += values_N / over
                needed += 1.0
    return excess_N, needed


def _reweighted(ids: list[str], names: list[str], values_KN: np.ndarray, wish: Wish) -> tuple[Plan, list[str]]:
    kept = [name for name in names if name in wish.protected or name in wish.below or name in wish.above]
    C_KN = torch.from_numpy(values_KN[[names.index(name) for name in kept]])
    now_K = C_KN.sum(1)

    def solved(part: float) -> tuple[torch.Tensor, bool]:
        """Weights that go this part of the way."""
        low_K, high_K = now_K.clone(), now_K.clone()
        for row, name in enumerate(kept):
            low = wish.above.get(name, float("-inf") if name in wish.below else float(now_K[row]))
            high = wish.below.get(name, float("inf") if name in wish.above else float(now_K[row]))
            low_K[row] = now_K[row] + part * (low - now_K[row]) if low > now_K[row] else low
            high_K[row] = now_K[row] + part * (high - now_K[row]) if high < now_K[row] else high
        return least_change(C_KN, Bounds(low_K, high_K))

    weights_N, met = solved(1.0)
    said = []
    if _taken(weights_N) > wish.drop_at_most:
        least, most = 0.0, 1.0
        for _ in range(HALVINGS):
            middle = (least + most) / 2
            least, most = (middle, most) if _taken(solved(middle)[0]) <= wish.drop_at_most else (least, middle)
        weights_N, met = solved(least)
        said.append(f"taking away {wish.drop_at_most:.1%} of the weight goes {least:.0%} of the way that was asked for")
    if not met:
        said.append("no weights between 0 and 2 meet all bounds to first order: they come as near as they can")
    return Plan.keeping(ids, weights=weights_N.numpy()), said


def _taken(weights_N: torch.Tensor) -> float:
    return float((1 - weights_N).clamp(min=0).mean())


def _offset(ids: list[str], excess_N: np.ndarray, needed: float, wish: Wish) -> tuple[Plan, list[str]]:
    """Offsets in proportion to standardised excess, as large as the first order asks for."""
    spread = excess_N.std()
    if needed <= 0 or spread == 0:
        return Plan.keeping(ids), []
    unit_N = (excess_N - excess_N.mean()) / spread
    wanted = excess_N.sum() - needed

    def plan(size: float) -> Plan:
        return Plan.keeping(ids, offsets=size * unit_N)

    def fits(size: float) -> bool:
        one = plan(size)
        return float(one.effective @ excess_N) > wanted and one.taken_away <= wish.drop_at_most

    least, most = 0.0, 8.0
    for _ in range(HALVINGS):
        middle = (least + most) / 2
        least, most = (middle, most) if fits(middle) else (least, middle)
    found = plan(least)
    reached = float(found.effective @ excess_N) <= wanted + 1e-3 * abs(needed)
    return found, [] if reached else ["offsets do not reach what was asked for within their limits"]
