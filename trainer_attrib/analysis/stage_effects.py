"""What would the model do had a stage's updates not been executed? Every stage, every behavior, one or more methods."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from trainer_attrib.analysis.effects.auto import Auto
from trainer_attrib.analysis.effects.coalitions import shapley
from trainer_attrib.analysis.effects.estimate import Estimate, Method, differences, estimate
from trainer_attrib.analysis.effects.first_order import FirstOrder
from trainer_attrib.analysis.effects.lineage import Lineage
from trainer_attrib.analysis.effects.propagate import Propagate
from trainer_attrib.analysis.effects.recorded import Change, Subtract
from trainer_attrib.analysis.effects.replay import Replay
from trainer_attrib.analysis.effects.retrain import Retrain
from trainer_attrib.analysis.effects.shadow import FromShadow
from trainer_attrib.analysis.replaying import Pace
from trainer_attrib.analysis.results import RELIABLE, Effect, Interaction, StageEffects
from trainer_attrib.errors import ConfigurationError
from trainer_attrib.ledger.reader import StageReader
from trainer_attrib.progress import progress

RUNGS: tuple[Method, ...] = (
    Auto(),
    Change(),
    Subtract(),
    FirstOrder(),
    Propagate(),
    FromShadow(),
    Replay(),
    Retrain(),
)
METHODS = {method.name: method for method in RUNGS}
"""What a string stands for."""


def stage_effects(lineage: Lineage, methods: Sequence[str | Method]) -> StageEffects:
    """Effects of every stage on every behavior by every method.

    Raises:
        ConfigurationError: an unknown method.
        AnalysisError: something is missing that a method needs, such as a program; said before anything is run.
    """
    chosen = [method_of(method) for method in methods]
    for method in chosen:
        for stage in lineage.stages:
            method.check(lineage, stage)
    asked = [(stage, method) for stage in range(len(lineage.stages)) for method in range(len(chosen))]
    answers = progress(lineage.runner.map(_Estimated(lineage, chosen), asked), "stage effects", len(asked))
    found = [(lineage.stages[s], chosen[m], one) for (s, m), one in zip(asked, answers, strict=True)]
    rows = [row for stage, method, one in found for row in _rows(lineage, stage, one.method or method.name, one)]
    caveats = [*(method.caveat for method in chosen), *(note for *_, one in found for note in one.notes)]
    caveats += [_unreliable(method, stage, one) for stage, method, one in found]
    sums = [
        row
        for method in chosen
        for row in _interactions(lineage, method.name, [one for _, its, one in found if its is method])
    ]
    return _result(lineage, rows, caveats, sums)


@dataclass(frozen=True)
class _Estimated:
    """The effect of a stage by a method, both by number."""

    lineage: Lineage
    methods: Sequence[Method]

    def __call__(self, asked: tuple[int, int]) -> Estimate:
        """Without the weights that it predicts, which nobody asks for here and which are as large as the model."""
        stage, method = asked
        return replace(estimate(self.methods[method], self.lineage, self.lineage.stages[stage]), displacement=None)


def _unreliable(method: Method, stage: StageReader, found: Estimate) -> str:
    """What to do about means that the error bars do not allow to be believed; empty if there are none."""
    pairs = list(zip(found.effects, found.error_bars, strict=True))
    count = sum(float(bar.mean()) > RELIABLE * abs(float(effect.mean())) for effect, bar in pairs)
    if not count or not method.instead:
        return ""
    name = method.name if found.method in ("", method.name) else f"{method.name} ({found.method})"
    return f"not reliable: {name} of stage '{stage.name}' on {count} of {len(pairs)} behaviors; run {method.instead}"


def shapley_values(lineage: Lineage, pace: Pace) -> StageEffects:
    """The Shapley value of every stage for every behavior."""
    found = shapley(lineage, pace)
    pairs = zip(lineage.stages, found, strict=True)
    rows = [row for stage, one in pairs for row in _rows(lineage, stage, one.method, one)]
    caveat = "a Shapley value is the mean over all orders of leaving stages out; leaving out this stage alone differs"
    return _result(lineage, rows, [caveat], _interactions(lineage, "shapley", found))


def _interactions(lineage: Lineage, method: str, found: Sequence[Estimate]) -> list[Interaction]:
    whole = differences(lineage.final, lineage.measure(lineage.start(lineage.stages[0])))
    return [
        Interaction(behavior.name, method, float(w.mean()), sum(float(one.effects[number].mean()) for one in found))
        for number, (behavior, w) in enumerate(zip(lineage.behaviors, whole, strict=True))
    ]


def _result(
    lineage: Lineage, rows: Sequence[Effect], caveats: Sequence[str], sums: Sequence[Interaction]
) -> StageEffects:
    said = dict.fromkeys(filter(None, [*caveats, *lineage.timeline.caveats()]))
    return StageEffects(tuple(rows), tuple(said), tuple(sums))


def method_of(method: str | Method) -> Method:
    """A method with its default settings, if it is a name.

    Raises:
        ConfigurationError: an unknown name.
    """
    if not isinstance(method, str):
        return method
    if method not in METHODS:
        raise ConfigurationError(f"Unknown method {method!r}.", fix=f"use one or several of {list(METHODS)}.")
    return METHODS[method]


def _rows(lineage: Lineage, stage: StageReader, method: str, found: Estimate) -> list[Effect]:
    rows = []
    for behavior, effects, bars in zip(lineage.behaviors, found.effects, found.error_bars, strict=True):
        for query, effect, bar in zip(behavior.queries, effects.tolist(), bars.tolist(), strict=True):
            reliable = bar <= RELIABLE * abs(effect)
            rows.append(
                Effect(behavior.name, query, stage.name, method, found.read_out, effect, bar, reliable, found.cost)
            )
    return rows
