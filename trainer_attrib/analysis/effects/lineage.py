"""The stages that led to a model, the states at their boundaries, and measuring behaviors there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor, nn

from trainer_attrib.analysis.behavior import Behavior
from trainer_attrib.analysis.displacement import Displacement, moved
from trainer_attrib.analysis.programs import Program
from trainer_attrib.analysis.timeline import Timeline
from trainer_attrib.analysis.training_state import TrainingState, standing
from trainer_attrib.errors import ConfigurationError
from trainer_attrib.execution.runner import Runner, Serial
from trainer_attrib.ledger.reader import StageReader
from trainer_attrib.tap.names import buffers_by_name, parameters_by_name

Values = list[Tensor]
"""One tensor per behavior, float64 [Q] on the CPU."""


@dataclass(frozen=True)
class Lineage:
    """What every method is given: the model standing at the end of its last stage, how it came there, and where work
    runs."""

    model: nn.Module
    stages: Sequence[StageReader]
    timeline: Timeline
    behaviors: Sequence[Behavior]
    programs: Mapping[str, Program]
    runner: Runner = field(default_factory=Serial)

    def measure(self, state: TrainingState) -> Values:
        """Every behavior with these weights and buffers."""
        with standing(self.model, state):
            return self._measured()

    def measure_moved(self, displacement: Displacement) -> Values:
        """Every behavior with the final weights moved; buffers stay as they are."""
        with moved(self.model, displacement):
            return self._measured()

    def _measured(self) -> Values:
        """Every behavior as the model stands now, batch by batch."""
        tasks = [(number, first) for number, behavior in enumerate(self.behaviors) for first in behavior.batches()]
        found = self.runner.map(_Measured(self.model, self.behaviors), tasks)
        return [torch.cat([next(found) for _ in behavior.batches()]) for behavior in self.behaviors]

    @cached_property
    def final(self) -> Values:
        """Every behavior of the model as it is."""
        return self.measure(TrainingState({}))

    def later(self, stage: StageReader) -> list[StageReader]:
        """Stages after this one."""
        return list(self.stages[self._index(stage) + 1 :])

    def later_steps(self, stage: StageReader) -> int:
        """Optimizer steps of the stages after this one: what running them again costs, in gradients of a batch."""
        return sum(later.count("steps") for later in self.later(stage))

    def start(self, stage: StageReader) -> TrainingState:
        """Where training stood when a stage began, in the terms of the model, with the state that its optimizer brought
        along.

        Raises:
            NotComparableError: weights whose values then are not known.
        """
        return self._state(stage, "start", stage)

    def end(self, stage: StageReader) -> TrainingState:
        """Where training stood when a stage ended, with the optimizer state that the next one begins with.

        Raises:
            NotComparableError: weights whose values then are not known.
        """
        return self._state(stage, "end", next(iter(self.later(stage)), None))

    def inside(self, stage: StageReader, snapshot: str) -> TrainingState:
        """The model's weights and buffers at any snapshot of a stage.

        Raises:
            NotComparableError: weights whose values then are not known.
            StageNotFoundError: no such snapshot.
        """
        if snapshot in ("start", "end"):
            return getattr(self, snapshot)(stage)
        end, places = self.end(stage), parameters_by_name(self.model)
        trained = {n: w for n, w in stage.snapshot(snapshot).items() if n in places and w.shape == places[n].shape}
        known = {name: value for name, value in stage.buffers(snapshot).items() if name in end.buffers}
        return TrainingState({**end.weights, **trained}, {**end.buffers, **known})

    def _state(self, stage: StageReader, when: str, next_stage: StageReader | None) -> TrainingState:
        known = buffers_by_name(self.model).keys()
        buffers = {name: value for name, value in stage.buffers(when).items() if name in known}
        carried = {} if next_stage is None else next_stage.optimizer_state().get(0, {})
        return TrainingState(self.timeline.at(stage, when), buffers, carried)

    def _index(self, stage: StageReader) -> int:
        return [s.name for s in self.stages].index(stage.name)


@dataclass(frozen=True)
class _Measured:
    """Values of one batch of one behavior, by its number and first query."""

    model: nn.Module
    behaviors: Sequence[Behavior]

    def __call__(self, batch: tuple[int, int]) -> Tensor:
        number, first = batch
        return self.behaviors[number].batch_values(self.model, first)


def chosen_stages(stages: Sequence[StageReader], names: Sequence[str] | None) -> list[StageReader]:
    """The stages of these names in the order of training; all of them without names.

    Raises:
        ConfigurationError: a name that none of them has, or none are chosen.
    """
    chosen = [stage for stage in stages if names is None or stage.name in names]
    unknown = set(names or ()) - {stage.name for stage in chosen}
    if unknown or not chosen:
        named = ", ".join(map(repr, sorted(unknown))) or "is named that"
        raise ConfigurationError(
            f"No stage {named} led to this model; these did: {[s.name for s in stages]}.",
            fix="choose among those.",
        )
    return chosen
