"""The weights without a stage as they were trained along with the later stages (``Recorder(shadow=...)``)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trainer_attrib.analysis.displacement import Displacement, between
from trainer_attrib.analysis.effects.estimate import Estimate, differences, pooled
from trainer_attrib.analysis.effects.lineage import Lineage, Values
from trainer_attrib.analysis.effects.pull import pull, reach
from trainer_attrib.analysis.effects.recorded import Subtract
from trainer_attrib.analysis.training_state import TrainingState, state_of
from trainer_attrib.errors import NotComparableError
from trainer_attrib.ledger.reader import StageReader

ERROR_SCALE = 4.0
"""From the standard error of two replicas to a bar that holds four of five true errors: measured in five regimes."""
SINGLE_SCALE = 0.4
"""Brings more than four of five true errors of a single shadow within the bar: measured in six regimes on seeds that
are not those of ``benchmarks/stage_effects.py`` (``docs/log.md``)."""


@dataclass(frozen=True)
class FromShadow:
    """Measured at the mean of a stage's shadows at the end of the last stage.

    Nothing is run again: what it cost was paid while the later stages trained. With two or more replicas the error bar
    comes from the standard error of their mean, made larger because what a small part of a batch does to all replicas
    alike is not in it. A single shadow has nothing to be compared with. Its bar is what the displaced weights would do
    had later stages left them alone (``subtract``), times the share of the displacement that later stages changed
    (``pull.py``), times the root of how far the shadow is from the model, relative to the weights: gradients of a part
    of a batch differ from those of all of it by noise, which adds up over the pull like a random walk.
    """

    name = "shadow"
    instead = "method='replay', or record the stages with two replicas of the shadow"
    caveat = ""

    def check(self, lineage: Lineage, stage: StageReader) -> None:
        """The last stage must have a complete shadow of this one.

        Raises:
            NotComparableError: it has none.
        """
        if not lineage.later(stage) or _replicas(lineage, stage):
            return
        last = lineage.stages[-1]
        known = [f"{s['of']} ({s['status']}{s['reason'] and ': '}{s['reason']})" for s in last.shadows()]
        raise NotComparableError(
            f"Stage '{last.name}' has no complete shadow of '{stage.name}'; it has {known or 'none'}.",
            cause=f"every stage after '{stage.name}' must be recorded with shadow=[Shadow({stage.name!r})].",
            fix="use method='replay', which needs the programs of the later stages instead.",
        )

    def price(self, lineage: Lineage, stage: StageReader) -> float:
        """Nothing is left to be paid."""
        return 0.0

    def estimate(self, lineage: Lineage, stage: StageReader) -> Estimate:
        """Measured at the shadows' weights; ``cost`` is what they took during training."""
        states = [_state(lineage, stage, replica) for replica in _replicas(lineage, stage)]
        center = states[0] if len(states) == 1 else _mean(states)
        effects, here = differences(lineage.final, lineage.measure(center)), state_of(lineage.model)
        away = between(here, center)
        if len(states) == 1:
            bars = _bars_of_one(Subtract().estimate(lineage, stage), away, here)
            notes = [
                f"stage '{stage.name}' has one shadow, which does not tell how uncertain it is: its error bar is a "
                "rule of thumb, two replicas would measure one"
            ]
        else:
            errors = _standard_errors([lineage.measure(state) for state in states])
            bars, notes = pooled(errors, scale=ERROR_SCALE), []
        return Estimate(effects, bars, "shadow weights", _cost(lineage, stage), away, notes)


def _bars_of_one(simple: Estimate, away: Displacement, here: TrainingState) -> Values:
    share = SINGLE_SCALE * pull(away, simple.displacement or {}) * reach(away, here.weights) ** 0.5
    return pooled(simple.effects, scale=share)


def _replicas(lineage: Lineage, stage: StageReader) -> list[int]:
    shadows = lineage.stages[-1].shadows()
    return [one["replica"] for one in shadows if one["of"] == stage.name and one["status"] == "complete"]


def _state(lineage: Lineage, stage: StageReader, replica: int) -> TrainingState:
    """The model as it stands, with what differs in the shadow."""
    last, here = lineage.stages[-1], state_of(lineage.model)
    shadow, buffers = last.shadow(stage.name, replica), last.shadow_buffers(stage.name, replica)
    return TrainingState(
        here.weights | {name: w for name, w in shadow.items() if name in here.weights},
        here.buffers | {name: b for name, b in buffers.items() if name in here.buffers},
    )


def _mean(states: Sequence[TrainingState]) -> TrainingState:
    def mean(values: list[Tensor]) -> Tensor:
        first = values[0]
        return torch.stack([v.double() for v in values]).mean(0) if first.is_floating_point() else first

    weights = {name: mean([state.weights[name] for state in states]) for name in states[0].weights}
    return TrainingState(weights, {name: mean([s.buffers[name] for s in states]) for name in states[0].buffers})


def _standard_errors(values: Sequence[Values]) -> Values:
    return [torch.stack(list(each)).std(0) / len(values) ** 0.5 for each in zip(*values, strict=True)]


def _cost(lineage: Lineage, stage: StageReader) -> float:
    """Gradients of whole batches: each replica's, and those at the model's weights that they are compared with."""
    cost = 0.0
    for later in lineage.later(stage):
        shares = [one["share"] or 0.0 for one in later.shadows() if one["of"] == stage.name]
        cost += later.count("steps") * 2 * sum(shares)
    return cost
