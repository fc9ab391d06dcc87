"""The cheapest rung of the ladder whose error bar is acceptable."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from trainer_attrib.analysis.effects.estimate import Estimate, Method, differences, pooled
from trainer_attrib.analysis.effects.lineage import Lineage
from trainer_attrib.analysis.effects.propagate import Propagate
from trainer_attrib.analysis.effects.recorded import Subtract
from trainer_attrib.analysis.effects.replay import Replay
from trainer_attrib.analysis.effects.retrain import Retrain
from trainer_attrib.analysis.effects.shadow import FromShadow
from trainer_attrib.errors import AnalysisError
from trainer_attrib.ledger.reader import StageReader

LADDER: tuple[Method, ...] = (Subtract(), FromShadow(), Propagate(), Replay(), Retrain())
"""From cheap to exact."""


@dataclass(frozen=True)
class Auto:
    """Climb the ladder until the error bar is acceptable; where none is, the highest rung that was reached.

    A shadow and a replay err independently: where both are at hand their mean is taken, and their disagreement.

    Args:
        accept: error bar relative to the effect, norms over all queries, up to which an estimate is taken.
        budget: what may be spent on a stage, as a share of its later optimizer steps; 1 allows retraining.
    """

    accept: float = 0.2
    budget: float = 1.0

    name = "auto"
    instead = "a larger budget (Auto(budget=1) may retrain), with the programs of the later stages"
    caveat = ""

    def check(self, lineage: Lineage, stage: StageReader) -> None:
        """The first rung needs nothing."""

    def price(self, lineage: Lineage, stage: StageReader) -> float:
        """All that it may spend."""
        return self.budget * lineage.later_steps(stage)

    def estimate(self, lineage: Lineage, stage: StageReader) -> Estimate:
        """By the rung that was reached."""
        left, spent, shadow, found = self.price(lineage, stage), 0.0, None, None
        for method in LADDER:
            price = method.price(lineage, stage)
            one = _attempt(method, lineage, stage) if price <= left + 1e-9 else None
            if one is None:
                continue
            left -= price
            spent += one.cost if price else 0.0  # what costs nothing now was paid during training
            found = replace(one, method=method.name)
            if method.name == "replay" and shadow is not None:
                found = _mean(shadow, found)
            if relative_bar(found) <= self.accept:
                break
            shadow = found if method.name == "shadow" else shadow
        assert found is not None  # the first rung needs nothing
        return replace(found, cost=spent)


def _mean(shadow: Estimate, other: Estimate) -> Estimate:
    """Of two independent estimates; the bar of each query is their disagreement."""
    effects = [(a + b) / 2 for a, b in zip(shadow.effects, other.effects, strict=True)]
    bars = pooled(differences(shadow.effects, other.effects), scale=1.0)
    names = {*(shadow.displacement or {}), *(other.displacement or {})}
    halves = [{name: part / 2 for name, part in (one.displacement or {}).items()} for one in (shadow, other)]
    away = {name: sum((half[name] for half in halves if name in half), torch.zeros(())) for name in names}
    read_out = f"mean of {shadow.read_out} and {other.read_out}"
    return Estimate(effects, bars, read_out, displacement=away, notes=other.notes, method="shadow and replay")


def relative_bar(found: Estimate) -> float:
    """Norm of the error bars over norm of the effects, over all queries of all behaviors."""
    bar, effect = float(torch.cat(found.error_bars).norm()), float(torch.cat(found.effects).norm())
    return bar / effect if effect > 0 else (math.inf if bar > 0 else 0.0)


def _attempt(method: Method, lineage: Lineage, stage: StageReader) -> Estimate | None:
    try:
        method.check(lineage, stage)
        return method.estimate(lineage, stage)
    except AnalysisError:
        return None  # something is missing that this rung needs
