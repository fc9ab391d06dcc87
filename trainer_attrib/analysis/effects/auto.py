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

    A shadow and a replay err mostly by noises that are independent: where both are at hand their mean is taken,
    weighted by the bars of each.

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
                found = _between(shadow, found)
            if relative_bar(found) <= self.accept:
                break
            shadow = found if method.name == "shadow" else shadow
        assert found is not None  # the first rung needs nothing
        return replace(found, cost=spent)


def _between(shadow: Estimate, replay: Estimate) -> Estimate:
    """The mean of two estimates, weighted by the inverse squares of their bars' norms; a replay that diverged is
    nothing. Bars hold what the two disagree about, and the shadow's own bar for what both get wrong alike: both see
    parts of batches only, whose noise makes Adam's second moments larger."""
    ours, theirs = (float(torch.cat(one.error_bars).square().sum()) for one in (shadow, replay))
    if not math.isfinite(theirs):
        return shadow
    weight = theirs / (ours + theirs) if ours + theirs > 0 else 0.5
    weighted = ((weight, shadow), (1 - weight, replay))
    effects = [weight * a + (1 - weight) * b for a, b in zip(shadow.effects, replay.effects, strict=True)]
    apart = pooled(differences(shadow.effects, replay.effects), scale=1.0)
    bars = [(a.square() + b.square()).sqrt() for a, b in zip(apart, shadow.error_bars, strict=True)]
    names = {*(shadow.displacement or {}), *(replay.displacement or {})}
    parts = [{name: w * part for name, part in (one.displacement or {}).items()} for w, one in weighted]
    away = {name: sum((part[name] for part in parts if name in part), torch.zeros(())) for name in names}
    read_out = f"mean of {shadow.read_out} and {replay.read_out}"
    return Estimate(effects, bars, read_out, displacement=away, notes=replay.notes, method="shadow and replay")


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
