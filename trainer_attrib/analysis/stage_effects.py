"""What would the model do had a stage's updates not been executed?"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trainer_attrib.analysis.behavior import Behavior
from trainer_attrib.analysis.displacement import moved, subtracted, weights_set_to
from trainer_attrib.analysis.results import RELIABLE, Effect, StageEffects
from trainer_attrib.analysis.retraining import Program, check_programs, retrain
from trainer_attrib.analysis.timeline import Timeline
from trainer_attrib.errors import ConfigurationError
from trainer_attrib.ledger.reader import StageReader


@dataclass(frozen=True)
class Lineage:
    """The stages that led to a model, the model standing at the end of the last one."""

    model: nn.Module
    stages: Sequence[StageReader]
    timeline: Timeline
    behaviors: Sequence[Behavior]
    programs: Mapping[str, Program] | None

    def measure(self, weights: dict[str, Tensor]) -> list[Tensor]:
        """Values of every behavior with these weights."""
        with weights_set_to(self.model, weights):
            return [behavior.values(self.model) for behavior in self.behaviors]

    def later(self, stage: StageReader) -> list[StageReader]:
        """Stages after this one."""
        names = [s.name for s in self.stages]
        return list(self.stages[names.index(stage.name) + 1 :])


@dataclass(frozen=True)
class _Estimate:
    effects: list[Tensor]  # per behavior, [Q]
    error_bars: list[Tensor]
    read_out: str
    cost: int


def change(lineage: Lineage, stage: StageReader) -> _Estimate:
    """What happened during the stage: behavior at its end minus behavior at its start. Exact and additive.

    It answers another question than the skip effect: later stages may undo, keep or amplify what happened here.
    """
    ends, starts = (lineage.measure(lineage.timeline.at(stage, when)) for when in ("end", "start"))
    effects = [end - start for end, start in zip(ends, starts, strict=True)]
    return _Estimate(effects, [0 * e for e in effects], "recorded weights", 0)


def subtract(lineage: Lineage, stage: StageReader) -> _Estimate:
    """Take the stage's displacement out of the final weights, shrunk by later weight decay, and measure.

    Exact for the last stage. For earlier ones it is a first look: it ignores how later stages would have trained from
    other weights, and nothing here has tested that. The error bar is therefore the larger of its disagreement with the
    stage's own change and its own size (measured on the demo: smaller bars miss the truth more often than not).
    """
    later = lineage.later(stage)
    if not later:
        return change(lineage, stage)
    removal = subtracted(lineage.timeline.change(stage), later)
    final = lineage.measure({})
    with moved(lineage.model, removal):
        without = lineage.measure({})
    effects = [f - w for f, w in zip(final, without, strict=True)]
    during = change(lineage, stage).effects
    bars = [torch.maximum((e - c).abs(), e.abs()) for e, c in zip(effects, during, strict=True)]
    return _Estimate(effects, bars, "moved weights", 0)


def retrained(lineage: Lineage, stage: StageReader) -> _Estimate:
    """Run the later stages again from the stage's start: the definition of the skip effect.

    Exact for the recorded batches, order and learning rates if the programs are those of the recording, which
    ``Analyzer.closure`` checks. Cost: optimizer steps run again.
    """
    later = lineage.later(stage)
    lineage.timeline.check_trainable(later)
    weights = retrain(lineage.model, lineage.timeline.at(stage, "start"), later, lineage.programs or {})
    effects = [f - w for f, w in zip(lineage.measure({}), lineage.measure(weights), strict=True)]
    return _Estimate(effects, [0 * e for e in effects], "retrained weights", sum(s.count("steps") for s in later))


def automatic(lineage: Lineage, stage: StageReader) -> tuple[str, _Estimate]:
    """The cheapest method whose error bar is acceptable: ``subtract``, else ``retrain`` if programs are given."""
    cheap = subtract(lineage, stage)
    reliable = all(bool(bar.mean() <= RELIABLE * e.mean().abs()) for e, bar in zip(*_pairs(cheap), strict=True))
    covered = all(later.name in (lineage.programs or {}) for later in lineage.later(stage))
    if reliable or not covered:
        return "subtract", cheap
    return "retrain", retrained(lineage, stage)


METHODS: dict[str, Callable[[Lineage, StageReader], _Estimate]] = {
    "change": change,
    "subtract": subtract,
    "retrain": retrained,
}


def stage_effects(lineage: Lineage, methods: Sequence[str]) -> StageEffects:
    """Effects of every stage on every behavior by every method.

    Raises:
        ConfigurationError: an unknown method.
        MissingProgramError: ``retrain`` without the programs of all later stages.
        NotComparableError: a stage trained weights that cannot be expressed in the model's.
    """
    unknown = [method for method in methods if method not in (*METHODS, "auto")]
    if unknown:
        raise ConfigurationError(f"Unknown method {unknown}.", fix=f"use one or several of {['auto', *METHODS]}.")
    if "retrain" in methods:
        check_programs(lineage.stages[1:], lineage.programs)
    rows: list[Effect] = []
    for stage in lineage.stages:
        for method in methods:
            name, found = automatic(lineage, stage) if method == "auto" else (method, METHODS[method](lineage, stage))
            rows += _rows(lineage, stage, name, found)
    caveats = [*_caveats({row.method for row in rows}), *lineage.timeline.caveats()]
    return StageEffects(tuple(rows), tuple(caveats))


def _rows(lineage: Lineage, stage: StageReader, method: str, found: _Estimate) -> list[Effect]:
    rows = []
    for behavior, effects, bars in zip(lineage.behaviors, *_pairs(found), strict=True):
        for query, effect, bar in zip(behavior.queries, effects.tolist(), bars.tolist(), strict=True):
            reliable = bar <= RELIABLE * abs(effect)
            rows.append(
                Effect(behavior.name, query, stage.name, method, found.read_out, effect, bar, reliable, found.cost)
            )
    return rows


def _pairs(found: _Estimate) -> tuple[list[Tensor], list[Tensor]]:
    return found.effects, found.error_bars


def _caveats(methods: set[str]) -> list[str]:
    said = {
        "change": "change is what happened during a stage; it is not what the model would be without the stage",
        "subtract": "subtract is a first look: it ignores how later stages would have trained from other weights, so "
        "that for all stages but the last not even its sign is certain",
        "retrain": "retrain is exact for the recorded batches and order; another data order would differ by the "
        "noise of training, which is not measured here",
    }
    return [text for method, text in said.items() if method in methods]
