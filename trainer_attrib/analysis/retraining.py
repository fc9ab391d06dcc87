"""Really running stages again: the ground truth that every estimate is compared with."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from trainer_attrib.analysis.programs import Program, check_programs, steps_of
from trainer_attrib.analysis.replaying import EXACT, carries, prepare, replay_stage
from trainer_attrib.analysis.training_state import (
    OptimizerState,
    TrainingState,
    copy_model,
    put,
    random_states_kept,
    state_of,
)
from trainer_attrib.errors import MissingProgramError
from trainer_attrib.ledger.reader import StageReader


@dataclass(frozen=True)
class Closure:
    """Whether the programs really are the recorded training: all stages run again with nothing removed.

    ``differences`` has for each stage the largest absolute difference of any weight at its end from what was recorded.
    """

    differences: dict[str, float]

    @property
    def exact(self) -> bool:
        """Every stage ended with the recorded bits."""
        return all(difference == 0.0 for difference in self.differences.values())

    def __str__(self) -> str:
        if self.exact:
            return "running every stage again reproduces the recorded weights bit for bit"
        worst = max(self.differences, key=lambda stage: self.differences[stage])
        return (
            f"running every stage again does NOT reproduce the recorded weights: after '{worst}' they differ by up to "
            f"{self.differences[worst]:.2g}; retraining is then an approximation"
        )


def retrain(
    model: nn.Module, start: TrainingState, stages: Sequence[StageReader], programs: Mapping[str, Program]
) -> TrainingState:
    """Where training stands after running ``stages`` in order from ``start``, on a copy; the model and all random
    states stay. Each stage's own trainer runs, except where the stage carried its optimizer's state on: it is then run
    step by step, because a trainer would begin with an empty one.

    Raises:
        MissingProgramError: a stage has no program, or none that can be run as it needs to be.
    """
    return [start, *_states_after(model, start, stages, programs)][-1]


def closure(
    model: nn.Module, start: TrainingState, stages: Sequence[StageReader], programs: Mapping[str, Program]
) -> Closure:
    """Run every stage again with nothing removed and compare with the recording."""
    differences = {}
    for stage, state in zip(stages, _states_after(model, start, stages, programs), strict=True):
        recorded = stage.snapshot("end")
        differences[stage.name] = max(float((state.weights[n] - recorded[n]).abs().max()) for n in recorded)
    return Closure(differences)


def _states_after(
    model: nn.Module, start: TrainingState, stages: Sequence[StageReader], programs: Mapping[str, Program]
) -> Iterator[TrainingState]:
    check_programs(stages, programs)
    carried: OptimizerState = start.optimizer
    with random_states_kept():
        trained = copy_model(model)
        put(trained, start)
        for number, stage in enumerate(stages):
            handed_on = number + 1 < len(stages) and carries(stages[number + 1])
            carried = _run(trained, stage, prepare(trained, stage, programs), carried, handed_on)
            yield state_of(trained, carried)


def _run(
    model: nn.Module, stage: StageReader, prepared: Any, carried: OptimizerState, handed_on: bool
) -> OptimizerState:
    """Train; returns the optimizer's state at the end where it is handed on to the next stage."""
    if carries(stage) or handed_on or not _trains(prepared):
        if not _trains(prepared) and steps_of(prepared, model) is None:
            raise MissingProgramError(
                f"A program returned {type(prepared).__name__}, which cannot be run.",
                fix="return a trainer (an object with train()), a function without arguments that trains the model, or "
                "an iterable of losses.",
            )
        return replay_stage(model, stage, prepared, carried, EXACT)[0]
    train = getattr(prepared, "train", prepared)
    train()
    return {}


def _trains(prepared: Any) -> bool:
    """Whether it trains by itself."""
    if isinstance(prepared, nn.Module) or inspect.isgeneratorfunction(prepared):
        return False
    return callable(getattr(prepared, "train", None)) or callable(prepared)
