"""Plans that bring first-order predictions where they should be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from trainer_attrib.analysis.forecasting.masking import masked_tokens
from trainer_attrib.analysis.forecasting.plan import Plan
from trainer_attrib.analysis.forecasting.prediction import View
from trainer_attrib.analysis.forecasting.results import Contributions
from trainer_attrib.errors import ConfigurationError
from trainer_attrib.numerics.reweighting import Bounds, least_change

HALVINGS = 30


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


def planned(view: View, found: Contributions, values_KN: np.ndarray, wish: Wish, how: str) -> tuple[Plan, list[str]]:
    """A plan, and what it does not reach.

    Args:
        view: inside the run's ``undisturbed()`` where tokens are masked.
        found: whose behaviors and rows the values are of.
        values_KN: what each example adds to each behavior's prediction.
        wish: what the predictions should be.
        how: see :meth:`~trainer_attrib.analysis.forecasting.forecast.Forecast.reshape`.
    """
    ids = [row.id for row in found.rows]
    if how == "reweight":
        return _reweighted(ids, list(found.behaviors), values_KN, wish)
    excess_N, needed = _excess(list(found.behaviors), values_KN, wish)
    if how == "offset":
        return _offset(ids, excess_N, needed, wish)
    order = np.argsort(-excess_N, kind="stable")
    gains = np.cumsum(excess_N[order] * (2 if how == "flip" else 1))
    useful = int((excess_N > 0).sum())
    most = min(useful, int(wish.drop_at_most * len(ids)), len(ids) - 1 if how == "drop" else len(ids))  # one is left
    count = min(int(np.searchsorted(gains, needed)) + 1 if needed > 0 else 0, most)
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


def _direction(view: View, found: Contributions, wish: Wish) -> dict[str, Tensor]:
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

    def solved(part: float) -> tuple[Tensor, bool]:
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


def _taken(weights_N: Tensor) -> float:
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
