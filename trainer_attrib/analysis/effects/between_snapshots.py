"""What a stage recorded at a few of its steps, between them: weights, second moments, learning rates, decay."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor

from trainer_attrib.ledger.reader import StageReader

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
        rates, over 1 - momentum for SGD, over the root of the second moment for Adam. 0 where a weight does not move:
        of Adam, where no gradient was seen yet.
        """
        rates = self._sums(first, last, lambda row, group: row["learning_rate"][group] / (1 - self._memory(row, group)))
        if self._sgd:
            return rates
        recorded = {e["name"]: e["step"] for e in self._stage.meta["snapshots"] if "moments" in e}
        speeds = _between(recorded, self._speeds, (first + last) / 2)
        slack = self._slack((first + last) / 2)
        return {name: rate * speeds[name].double() * slack[name] for name, rate in rates.items() if name in speeds}

    def decay(self, first: int, last: int) -> Named:
        """What weight decay alone leaves of each weight: products of 1 - lr * wd over the steps; SGD's decay passes
        through the momentum and is 1 - lr * wd / (1 - momentum). 1 where it is divided by the second moment."""
        if not (self._sgd or self._optimizer["decoupled_weight_decay"]):
            return {}

        def logarithm(row: dict[str, Any], group: int) -> Tensor:
            lost = row["learning_rate"][group] * row["weight_decay"][group] / (1 - self._memory(row, group))
            return torch.tensor(1 - lost, dtype=torch.float64).clamp_min(1e-300).log()

        return {name: total.exp() for name, total in self._sums(first, last, logarithm).items()}

    def curvature_of_decay(self, first: int, last: int) -> Named:
        """Weight decay that Adam adds to the gradients, as the curvature that it is; mean over the steps."""
        if self._sgd or self._optimizer["decoupled_weight_decay"]:
            return {}
        sums = self._sums(first, last, lambda row, group: row["weight_decay"][group] / (last - first))
        return {name: total for name, total in sums.items() if total}

    @property
    def trained(self) -> list[str]:
        """The weights that the stage's optimizer has, group by group."""
        return [name for group in self._optimizer["groups"] for name in group["parameters"]]

    @property
    def _sgd(self) -> bool:
        return self._optimizer["class"].endswith(".SGD")

    def _memory(self, row: dict[str, Any], group: int) -> float:
        """A momentum that lengthens steps; Adam's is a mean and does not."""
        return row["beta1"][group] if self._sgd else 0.0

    def _sums(self, first: int, last: int, of: Callable[[dict[str, Any], int], Any]) -> Named:
        """A sum over steps for each weight; weights of a group share it."""
        found = {}
        for number, group in enumerate(self._optimizer["groups"]):
            total = torch.as_tensor(sum(of(row, number) for row in self.rows[first:last]), dtype=torch.float64)
            found.update(dict.fromkeys(group["parameters"], total))
        return found

    def _slack(self, step: float) -> Named:
        """Which part of a change of the gradient moves a weight although Adam divides by what the gradients are.

        Mean and second moment of gradients that all change by a: d(m / sqrt(v)) = a / sqrt(v) - m * 2 m a / (2 v^1.5) =
        a / sqrt(v) * (1 - m^2 / v). Where gradients are all alike (as all are in a fresh optimizer's first step), Adam
        moves by the learning rate whatever their size, and a change has no effect. m / sqrt(v) is how far the weight
        moved between the snapshots around the step, over the learning rates.
        """
        steps = sorted({entry["step"] for entry in self._stage.meta["snapshots"]})
        last = min((s for s in steps if s >= step), default=steps[-1])
        first = max((s for s in steps if s < last), default=0)
        start, end, kept = self.weights(first), self.weights(last), self.decay(first, last)
        rates = self._sums(first, last, lambda row, group: row["learning_rate"][group])
        one = torch.ones(())
        moved = {name: kept.get(name, one) * start[name].double() - end[name].double() for name in start}
        return {n: 1 - (m / rates[n]).nan_to_num(0.0).clamp(-1, 1).square() for n, m in moved.items() if n in rates}

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
