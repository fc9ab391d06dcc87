"""What is measured of one pipeline: which stage is named, and what each remedy does to accuracy and worst group."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from spurious_runs.pipeline import (
    GUILTY,
    STAGES,
    Accuracy,
    Examples,
    Pipeline,
    Weights,
    accuracy,
    follows_shortcut,
    worst_group_margin,
)
from trainer_attrib import Analyzer, StageEffects

TRAINED, BALANCED = "trained", "balanced stage"
METHODS = ("subtract", "retrain")
LOSS_ALLOWED = 0.02  # of average accuracy, in the search for the strength of a remedy
STRENGTHS = np.linspace(0, 1.5, 31)[1:]
DROPPED = (0.5, 0.8, 0.9, 0.95)
AFTER = STAGES[STAGES.index(GUILTY) + 1 :]


@dataclass(frozen=True)
class Arm:
    """A model and how it came about; ``setting`` is what the search on held-out data chose."""

    name: str
    tested: Accuracy
    setting: str = ""


@dataclass(frozen=True)
class Found:
    """Of one pipeline and seed. ``effects`` is behavior -> method -> stage -> mean effect."""

    arms: list[Arm]
    effects: dict[str, dict[str, dict[str, float]]]


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
        """Of every stage on following the shortcut and on the worst group."""
        behaviors = [
            follows_shortcut(self.pipeline.validation),
            worst_group_margin(self.model, self.pipeline.validation),
        ]
        return self.analyzer.stage_effects(behaviors, METHODS, self.pipeline.programs())

    def arms(self) -> Iterable[Arm]:
        """Trained as it is, without the stage, without the shortcut, and after each remedy."""
        yield self._arm(TRAINED, self.model)
        yield self._arm("without the stage", self.pipeline.run(self.before, AFTER))
        yield self._arm(BALANCED, self._replayed(self.pipeline.balanced))
        yield self._search("weights moved", ((f"{strength:.2f}", self.moved(strength)) for strength in STRENGTHS))
        order = self.responsible()
        yield self._search("examples dropped", self._dropped(order))
        shuffled = np.random.default_rng(0).permutation(order)
        yield self._search("as many at random", self._dropped(shuffled))

    def moved(self, strength: float) -> nn.Module:
        """The trained model with this part of what the stage did to the weights taken out."""
        stage = self.analyzer.ledger.stage(GUILTY)
        start, end, final = stage.snapshot("start"), stage.snapshot("end"), self.states[STAGES[-1]]
        return self.pipeline.with_weights(final | {n: final[n] - strength * (end[n] - start[n]) for n in end})

    def responsible(self) -> np.ndarray:
        """Places of the stage's examples, those first whose training made the model follow the shortcut most."""
        everything = len(self.pipeline.validation.aligned)
        behavior = follows_shortcut(self.pipeline.validation, per_query=everything)
        influence = self.analyzer.influence([behavior], [GUILTY], recipe="grad_dot")
        scores = dict(zip(influence.examples.ids, influence.scores[0].tolist(), strict=True))
        return np.argsort([-scores[name] for name in self.pipeline.stages[GUILTY].ids], kind="stable")

    def _dropped(self, order: np.ndarray) -> Iterable[tuple[str, nn.Module]]:
        examples = self.pipeline.stages[GUILTY]
        for share in DROPPED:
            kept = np.sort(order[int(share * len(order)) :])
            yield f"{share:.0%}", self._replayed(examples.take(kept))

    def _replayed(self, examples: Examples) -> nn.Module:
        return self.pipeline.instead(examples).run(self.before, (GUILTY, *AFTER))

    def _search(self, name: str, candidates: Iterable[tuple[str, nn.Module]]) -> Arm:
        """The candidate whose worst held-out group is best, of those that keep the average; the trained model if none.

        The groups of the held-out examples are known, as is usual where worst groups are to be mended.
        """
        best, chosen, setting = self._held_out.worst, self.model, "nothing"
        for label, model in candidates:
            found = accuracy(model, self.pipeline.validation.whole)
            if found.worst > best and found.average >= self._held_out.average - LOSS_ALLOWED:
                best, chosen, setting = found.worst, model, label
        return self._arm(name, chosen, setting)

    def _arm(self, name: str, model: nn.Module, setting: str = "") -> Arm:
        return Arm(name, accuracy(model, self.pipeline.test.whole), setting)


def measured(make: Callable[[], Pipeline]) -> Found:
    """Train, record, ask, mend."""
    with tempfile.TemporaryDirectory() as folder:
        recorded = Recorded(make(), Path(folder, "ledger"))
        effects: dict[str, dict[str, dict[str, float]]] = {}
        for mean in recorded.effects().summary():
            effects.setdefault(mean.behavior, {}).setdefault(mean.method, {})[mean.stage] = mean.effect
        return Found(list(recorded.arms()), effects)


def _copied(model: nn.Module) -> Weights:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}
