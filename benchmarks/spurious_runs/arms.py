"""What is measured of one pipeline: which stage is named, and what each remedy does to accuracy and worst group."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from spurious_runs.pipeline import (
    GUILTY,
    HARM,
    STAGES,
    Accuracy,
    Examples,
    Pipeline,
    Weights,
    accuracies,
    accuracy,
    follows_shortcut,
    margin_where_misled,
    worst_group_margin,
)
from trainer_attrib import Analyzer, StageEffects

TRAINED, WITHOUT, BALANCED = "trained", "without the stage", "balanced stage"
MOVED, DROPPED_TOP, DROPPED_RANDOM = "weights moved", "examples dropped", "as many at random"
REMEDIES = (MOVED, DROPPED_TOP)
METHODS = ("subtract", "replay", "retrain")
LOSS_ALLOWED = 0.02  # of average accuracy, in the search for the strength of a remedy
STRENGTHS = tuple(float(s) for s in np.linspace(0, 1.5, 31))
SHARES_DROPPED = (0.8, 0.85, 0.9, 0.95)
AFTER = STAGES[STAGES.index(GUILTY) + 1 :]


@dataclass(frozen=True)
class Arm:
    """A model and how it came about; ``setting`` is the strength or the share that the search chose."""

    name: str
    tested: Accuracy
    setting: float = 0.0


@dataclass(frozen=True)
class Found:
    """Of one pipeline and seed. ``effects`` is behavior -> method -> stage -> mean effect."""

    arms: dict[str, Arm]
    effects: dict[str, dict[str, dict[str, float]]]
    closed: bool  # running all stages again gave the recorded bits
    told_apart: float  # how often an example with the shortcut is held more responsible than one without

    def gap_closed(self, arm: str) -> float:
        """Which part of the distance to the worst group of training without the shortcut an arm covers."""
        worst = {name: self.arms[name].tested.worst for name in (TRAINED, BALANCED, arm)}
        return (worst[arm] - worst[TRAINED]) / (worst[BALANCED] - worst[TRAINED])

    def named(self, behavior: str, method: str) -> str:
        """The stage that did the most harm."""
        effects = self.effects[behavior][method]
        return max(effects, key=lambda stage: HARM[behavior] * effects[stage])


class Recorded:
    """A pipeline trained with the callback in every stage, and what can be done about its shortcut."""

    def __init__(self, pipeline: Pipeline, ledger: Path) -> None:
        self.pipeline = pipeline
        self.model: Any = pipeline.with_weights(pipeline.initial.state_dict())
        self.states: dict[str, Weights] = {"": _copied(self.model)}  # after each stage
        for stage, program in pipeline.programs(ledger).items():
            program(self.model).train()
            self.states[stage] = _copied(self.model)
        self.analyzer = Analyzer(ledger, self.model)
        self.before = self.states[STAGES[STAGES.index(GUILTY) - 1]]
        self._held_out = accuracy(self.model, pipeline.validation.whole)

    def effects(self) -> StageEffects:
        """Of every stage on following the shortcut, on inputs patched so that it misleads, on the worst group."""
        behaviors = [
            follows_shortcut(self.pipeline.validation),
            margin_where_misled(self.pipeline.validation),
            worst_group_margin(self.model, self.pipeline.validation),
        ]
        return self.analyzer.stage_effects(behaviors, METHODS, self.pipeline.programs())

    def arms(self) -> Iterator[Arm]:
        """Trained as it is, without the stage, without the shortcut, and after each remedy."""
        yield self._arm(TRAINED, self.model)
        yield self._arm(WITHOUT, self.pipeline.run(self.before, AFTER))
        yield self._arm(BALANCED, self._replayed(self.pipeline.balanced))
        yield self.moved()
        order = self.responsible()
        dropped = self._search(DROPPED_TOP, ((share, self.without(order, share)) for share in SHARES_DROPPED))
        yield dropped
        shuffled = np.random.default_rng(0).permutation(order)
        yield self._arm(DROPPED_RANDOM, self.without(shuffled, dropped.setting), dropped.setting)

    def moved(self) -> Arm:
        """The trained model moved towards where a coarse replay says it would be without the stage."""
        groups, average = accuracies(self.pipeline.validation.whole)
        removal = self.analyzer.remove(
            GUILTY, groups, [average], programs=self.pipeline.programs(), tolerance=LOSS_ALLOWED, scales=STRENGTHS
        )
        model = removal.apply(self.pipeline.with_weights(self.states[STAGES[-1]]))
        return self._arm(MOVED, model, removal.chosen.scale)

    @cached_property
    def influence(self) -> np.ndarray:
        """Of each of the stage's examples on following the shortcut."""
        everything = len(self.pipeline.validation.aligned)
        behavior = follows_shortcut(self.pipeline.validation, per_query=everything)
        found = self.analyzer.influence([behavior], [GUILTY], recipe="grad_cos")
        scores = dict(zip(found.examples.ids, found.scores[0].tolist(), strict=True))
        return np.array([scores[name] for name in self.pipeline.stages[GUILTY].ids])

    def told_apart(self) -> float:
        """How often an example with the shortcut scores above one of the few that contradict it; 0.5 by chance."""
        examples, scores = self.pipeline.stages[GUILTY], self.influence
        has = (examples.labels == examples.shortcuts).numpy()
        return float((scores[has][:, None] > scores[~has]).mean())

    def responsible(self) -> np.ndarray:
        """Places of the stage's examples, those first whose training made the model follow the shortcut most.

        They take turns by label and rank: dropping any first part leaves as many of each label.
        """
        examples = self.pipeline.stages[GUILTY]
        order = np.argsort(-self.influence, kind="stable")
        labels, rank = examples.labels.numpy()[order], np.zeros(len(order))
        for label in (0, 1):
            rank[labels == label] = np.linspace(0, 1, int((labels == label).sum()))
        return order[np.argsort(rank, kind="stable")]

    def without(self, order: np.ndarray, share: float) -> nn.Module:
        """Trained again without the first part of the stage's examples in this order, for as many epochs."""
        kept = np.sort(order[round(share * len(order)) :])
        return self._replayed(self.pipeline.stages[GUILTY].take(kept))

    def _replayed(self, examples: Examples) -> nn.Module:
        return self.pipeline.instead(examples).run(self.before, (GUILTY, *AFTER))

    def _search(self, name: str, candidates: Iterable[tuple[float, nn.Module]]) -> Arm:
        """The candidate whose worst held-out group is best, of those that keep the average; the trained model if none.

        The groups of the held-out examples are known, as is usual where worst groups are to be mended.
        """
        best, chosen, setting = self._held_out.worst, self.model, 0.0
        for tried, model in candidates:
            found = accuracy(model, self.pipeline.validation.whole)
            if found.worst > best and found.average >= self._held_out.average - LOSS_ALLOWED:
                best, chosen, setting = found.worst, model, tried
        return self._arm(name, chosen, setting)

    def _arm(self, name: str, model: nn.Module, setting: float = 0.0) -> Arm:
        return Arm(name, accuracy(model, self.pipeline.test.whole), setting)


def measured(pipeline: Pipeline) -> Found:
    """Train, record, ask, mend."""
    with tempfile.TemporaryDirectory() as folder:
        recorded = Recorded(pipeline, Path(folder, "ledger"))
        effects: dict[str, dict[str, dict[str, float]]] = {}
        for mean in recorded.effects().summary():
            effects.setdefault(mean.behavior, {}).setdefault(mean.method, {})[mean.stage] = mean.effect
        closure = recorded.analyzer.closure(pipeline.programs())
        return Found({arm.name: arm for arm in recorded.arms()}, effects, closure.exact, recorded.told_apart())


def _copied(model: nn.Module) -> Weights:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}
