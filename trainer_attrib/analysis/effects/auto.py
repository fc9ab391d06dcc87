"""The cheapest rung of the ladder whose error bar is acceptable."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from trainer_attrib.analysis.effects.estimate import Estimate, Method
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
    """Climb the ladder until the error bar is acceptable; where nothing is, the estimate with the smallest one.

    Args:
        accept: error bar relative to the effect, norms over all queries, up to which an estimate is taken.
        budget: what may be spent on a stage, as a share of its later optimizer steps; 1 allows retraining.
    """

    accept: float = 0.2
    budget: float = 1.0

    name = "auto"
    caveat = ""

    def check(self, lineage: Lineage, stage: StageReader) -> None:
        """The first rung needs nothing."""

    def price(self, lineage: Lineage, stage: StageReader) -> float:
        """All that it may spend."""
        return self.budget * lineage.later_steps(stage)

    def estimate(self, lineage: Lineage, stage: StageReader) -> Estimate:
        """By the rung that was reached."""
        left, found = self.price(lineage, stage), list[Estimate]()
        for method in LADDER:
            one = _attempt(method, lineage, stage) if method.price(lineage, stage) <= left + 1e-9 else None
            if one is None:
                continue
            left -= method.price(lineage, stage)
            found.append(replace(one, method=method.name))
            if relative_bar(one) <= self.accept:
                break
        return replace(min(found, key=relative_bar), cost=sum(one.cost for one in found))


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
