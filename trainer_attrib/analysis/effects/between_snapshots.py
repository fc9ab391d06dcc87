"""What a stage recorded at a few of its steps, between them: weights, second moments, learning rates, decay."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor

from trainer_attrib.ledger.reader import StageReader
from trainer_attrib.numerics.update_rules import SGDSettings, SGDState, sgd_step

Named = dict[str, Tensor]


class BetweenSnapshots:
    """A stage at any of its steps; what is not recorded there is interpolated linearly.

    Optimizers are SGD, Adam or AdamW, one for the whole stage.
    """

    def __init__(self, stage: StageReader) -> None:
        self._stage = stage
        [self._optimizer] = stage.meta["optimizers"]
        # a stage's snapshots may not fit into memory together; neighbours are needed together
        self._weights = lru_cache(maxsize=2)(stage.snapshot)
        self._speeds = lru_cache(maxsize=2)(self._speeds_at)

    @cached_property
    def rows(self) -> list[dict[str, Any]]:
        """One per executed step: the settings that it used."""
        columns = ["learning_rate", "weight_decay", "beta1"]
        return self._stage.steps().select(columns).to_pylist()

    def weights(self, step: float) -> Named:
        """What the stage trained, after so many of its steps."""
        recorded = {entry["name"]: entry["step"] for entry in self._stage.meta["snapshots"]}
        return _between(recorded, self._weights, step)

    def metric(self, first: int, last: int) -> Named:
        """How far a unit of constant gradient moves each weight in the steps from ``first`` up to ``last``: learning
        rates, times what momentum makes of them for SGD, over the root of the second moment for Adam. 0 where a weight
        does not move: of Adam, where no gradient was seen yet.

        A gradient of SGD moves a weight by lr * (1 + momentum + momentum^2 + ...), up to the stage's end: what is left
        in the buffer then is dropped with the optimizer.
        """
        rates = self.rates(first, last)
        if not self.adaptive:
            return rates
        speeds, directions = self.speeds((first + last) / 2), self.directions((first + last) / 2)
        slack = {name: 1 - direction.square() for name, direction in directions.items()}
        return {name: rate * speeds[name] * slack[name] for name, rate in rates.items() if name in speeds}

    def rates(self, first: int, last: int) -> Named:
        """Sums of learning rates in the steps from ``first`` up to ``last``; for SGD what momentum makes of them."""
        return self._sums(first, last, self._reach)

    def speeds(self, step: float) -> Named:
        """Adam's 1 / (root of the second moment + epsilon) at a step; 0 where there was no gradient so far."""
        recorded = {e["name"]: e["step"] for e in self._stage.meta["snapshots"] if "moments" in e}
        return {name: speed.double() for name, speed in _between(recorded, self._speeds, step).items()}

    def decay(self, first: int, last: int) -> Named:
        """What weight decay alone leaves of a displacement from one step to another, exactly: 1 - lr * wd at every
        step, and for SGD the same through the momentum. Adam divides it by the second moment, and 1 is left here."""
        found = {}
        for number, group in enumerate(self._optimizer["groups"]):
            left = self._remains[number][last] / self._remains[number][first]
            found.update(dict.fromkeys(group["parameters"], torch.tensor(left, dtype=torch.float64)))
        return found

    @cached_property
    def _remains(self) -> list[list[float]]:
        """For each group, what is left of 1 after so many steps of decay from the stage's start."""
        return [self._decayed(number, group["settings"]) for number, group in enumerate(self._optimizer["groups"])]

    def _decayed(self, group: int, settings: Mapping[str, Any]) -> list[float]:
        state, remains = SGDState(torch.ones(()).double(), torch.zeros(()).double()), [1.0]
        for step, row in enumerate(self.rows):
            rate, decay = row["learning_rate"][group], row["weight_decay"][group]
            if not self.adaptive:
                rule = SGDSettings(
                    learning_rate=rate, momentum=row["beta1"][group], nesterov=bool(settings.get("nesterov")),
                    weight_decay=decay,
                )  # fmt: skip
                state = sgd_step(state, torch.zeros(()).double(), rule, step + 1)
            elif self._optimizer["decoupled_weight_decay"]:
                state = SGDState((1 - rate * decay) * state.weight, state.momentum)
            remains.append(max(float(state.weight), 1e-300))
        return remains

    def curvature_of_decay(self, first: int, last: int) -> Named:
        """Weight decay that Adam adds to the gradients, as the curvature that it is; mean over the steps."""
        if not self.adaptive or self._optimizer["decoupled_weight_decay"]:
            return {}
        sums = self._sums(first, last, lambda row, group, _: row["weight_decay"][group] / (last - first))
        return {name: total for name, total in sums.items() if total}

    @property
    def trained(self) -> list[str]:
        """The weights that the stage's optimizer has, group by group."""
        return [name for group in self._optimizer["groups"] for name in group["parameters"]]

    @property
    def adaptive(self) -> bool:
        """Whether the optimizer is Adam or AdamW, and not SGD."""
        return not self._optimizer["class"].endswith(".SGD")

    def _reach(self, row: dict[str, Any], group: int, step: int) -> float:
        """How far a unit of gradient at a step moves a weight until the stage's end; Adam's momentum is a mean, which
        does not lengthen it."""
        momentum = 0.0 if self.adaptive else row["beta1"][group]
        return row["learning_rate"][group] * (1 - momentum ** (len(self.rows) - step)) / (1 - momentum)

    def _sums(self, first: int, last: int, of: Callable[[dict[str, Any], int, int], float]) -> Named:
        """A sum over steps for each weight, of a step's settings, the weight's group and the step's number from 0."""
        found = {}
        for number, group in enumerate(self._optimizer["groups"]):
            total = sum(of(self.rows[step], number, step) for step in range(first, last))
            total = torch.as_tensor(total, dtype=torch.float64)
            found.update(dict.fromkeys(group["parameters"], total))
        return found

    def directions(self, step: float) -> Named:
        """Adam's mean of the gradients over the root of their mean square at a step, from -1 to 1: how far the weight
        moved between the snapshots around the step, over the learning rates. Where gradients are all alike (as all are
        in a fresh optimizer's first step), it is their sign.
        """
        steps = sorted({entry["step"] for entry in self._stage.meta["snapshots"]})
        last = min((s for s in steps if s >= step), default=steps[-1])
        first = max((s for s in steps if s < last), default=0)
        start, end, kept = self.weights(first), self.weights(last), self.decay(first, last)
        rates = self._sums(first, last, lambda row, group, _: row["learning_rate"][group])
        moved = {name: kept[name] * start[name].double() - end[name].double() for name in rates}
        return {n: (m / rates[n]).nan_to_num(0.0).clamp(-1, 1) for n, m in moved.items()}

    def _speeds_at(self, snapshot: str) -> Named:
        """1 / (root of the second moment + epsilon); 0 where there was no gradient: such a weight did not move, and the
        curvature there is 0 too as long as what it belongs to is not used."""
        settings = {name: group["settings"] for group in self._optimizer["groups"] for name in group["parameters"]}
        moments = {name: v.double() for name, v in self._stage.moments(snapshot).items() if name in settings}
        return {n: torch.where(v > 0, 1 / (v.sqrt() + settings[n].get("eps", 1e-8)), 0.0) for n, v in moments.items()}


def _between(recorded: dict[str, int], read: Callable[[str], Named], step: float) -> Named:
    """Linear between the two recorded neighbours of a step, constant beyond the outermost ones."""
    before = max((name for name in recorded if recorded[name] <= step), key=recorded.__getitem__, default=None)
    after = min((name for name in recorded if recorded[name] >= step), key=recorded.__getitem__, default=None)
    first, last = before or after, after or before
    if first is None or last is None:
        return {}
    if first == last or recorded[first] == recorded[last]:
        return read(last)
    share = (step - recorded[first]) / (recorded[last] - recorded[first])
    start, end = read(first), read(last)
    return {name: torch.lerp(start[name], end[name], share) for name in start.keys() & end.keys()}
