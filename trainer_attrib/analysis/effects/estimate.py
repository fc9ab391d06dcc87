"""What a method of the ladder is asked and what it answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from trainer_attrib.analysis.displacement import Displacement
from trainer_attrib.analysis.effects.lineage import Lineage, Values
from trainer_attrib.ledger.reader import StageReader


@dataclass(frozen=True)
class Estimate:
    """The effect of one stage: behaviors with it minus behaviors without it.

    Args:
        effects: one tensor per behavior, float64 [Q].
        error_bars: of the same shapes, in the behavior's unit, at least 0.
        read_out: how behaviors were read off; shown in every table.
        cost: in gradients of a whole batch of a later stage, which is what an optimizer step run again costs.
        displacement: predicted weights without the stage minus the final ones, where the method predicts weights.
        notes: what to keep in mind of this very estimate.
        method: the rung that gave it, where a method chose among several.
    """

    effects: Values
    error_bars: Values
    read_out: str
    cost: float = 0.0
    displacement: Displacement | None = None
    notes: Sequence[str] = ()
    method: str = ""


class Method(Protocol):
    """A rung of the ladder. Its settings are its fields; strings stand for the defaults."""

    @property
    def name(self) -> str:
        """Shown in every table."""
        ...

    @property
    def caveat(self) -> str:
        """What to keep in mind of everything that it says; empty if nothing."""
        ...

    @property
    def instead(self) -> str:
        """What to run where its error bar is too large for its effect; empty if it has no error."""
        ...

    def check(self, lineage: Lineage, stage: StageReader) -> None:
        """Raise an :class:`~trainer_attrib.errors.AnalysisError` if something is missing to estimate a stage's effect.
        Cheap: all stages are checked before the first is estimated."""
        ...

    def price(self, lineage: Lineage, stage: StageReader) -> float:
        """What :meth:`estimate` will cost at most, in the unit of ``Estimate.cost``."""
        ...

    def estimate(self, lineage: Lineage, stage: StageReader) -> Estimate:
        """The effect of a stage that is not the last one on every behavior of the lineage."""
        ...


def estimate(method: Method, lineage: Lineage, stage: StageReader) -> Estimate:
    """The effect of any stage. Of the last one it is known exactly, whatever the method: what happened during it."""
    return method.estimate(lineage, stage) if lineage.later(stage) else during(lineage, stage)


def during(lineage: Lineage, stage: StageReader) -> Estimate:
    """Behaviors at a stage's end minus behaviors at its start."""
    effects = differences(lineage.measure(lineage.end(stage)), lineage.measure(lineage.start(stage)))
    removal = {name: -change for name, change in lineage.timeline.change(stage).items()}
    return Estimate(effects, zeros(effects), "recorded weights", displacement=removal)


def differences(first: Values, second: Values) -> Values:
    """First minus second, behavior by behavior."""
    return [a - b for a, b in zip(first, second, strict=True)]


def pooled(*disagreements: Values, scale: float) -> Values:
    """Error bars from what ways to read an effect disagree about: root mean square of the ways, and of each query's own
    disagreement with that of all queries of its behavior, because two ways may agree on a query by chance.

    Args:
        disagreements: one tensor per behavior for each pair of ways; infinite or NaN where one of them failed.
        scale: brings four of five true errors within the bar.
    """
    bars = []
    for of_one in zip(*disagreements, strict=True):
        square = torch.stack([d.nan_to_num(nan=torch.inf).square() for d in of_one]).mean(0)
        bars.append(scale * ((square + square.mean()) / 2).sqrt())
    return bars


def zeros(values: Values) -> Values:
    """Error bars of what has no error."""
    return [torch.zeros_like(value) for value in values]
