"""Running recorded stages again step by step, exactly or more coarsely, from any state of training.

Every step takes its batch from the stage's program and its learning rate, weight decay and betas from the ledger, in
an optimizer that is rebuilt from the ledger. With nothing merged and nothing thinned that is the recorded training.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from trainer_attrib.analysis.programs import Averaging, Program, Step, Steps, steps_of
from trainer_attrib.analysis.stepping import CarriedState, Row, can_merge, rebuild_optimizer, use_settings
from trainer_attrib.analysis.training_state import (
    OptimizerState,
    TrainingState,
    copy_model,
    put,
    random_states_kept,
    state_of,
)
from trainer_attrib.errors import MissingProgramError, NotComparableError
from trainer_attrib.ledger.reader import StageReader
from trainer_attrib.tap.names import parameters_by_name


@dataclass(frozen=True)
class Pace:
    """How coarsely stages are run again.

    Args:
        merge: so many recorded steps become one, on the first one's batch. Steps of optimizers that cannot be merged
            are taken one by one.
        thin: one in so many of a batch's examples is used.
    """

    merge: int = 1
    thin: int = 1

    def __str__(self) -> str:
        return f"{self.merge}x{self.thin}"


EXACT = Pace()


@dataclass(frozen=True)
class Replayed:
    """Where training stands after the stages, and what it cost in gradients of a whole batch."""

    state: TrainingState
    cost: float


def replay(
    model: nn.Module,
    start: TrainingState,
    stages: Sequence[StageReader],
    programs: Mapping[str, Program],
    pace: Pace = EXACT,
) -> Replayed:
    """Run stages in order from a state, on a copy. The model and all random states stay as they are.

    Two replays draw the same random numbers: their batches and dropout masks are the same.

    Raises:
        MissingProgramError: a program does not say how its stage runs step by step.
        NotComparableError: the recorded optimizer cannot be rebuilt.
    """
    cost, carried = 0.0, start.optimizer
    with random_states_kept():
        trained = copy_model(model)
        put(trained, start)
        for stage in stages:
            prepared = prepare(trained, stage, programs)
            carried, spent = replay_stage(trained, stage, prepared, carried, pace)
            cost += spent
        return Replayed(state_of(trained, carried), cost)


def prepare(model: nn.Module, stage: StageReader, programs: Mapping[str, Program]) -> Any:
    """What the stage's program makes of a model in training mode, in which only what the stage trained has a gradient.

    What a stage froze, and adapters that came later, must not train.
    """
    trainable = set(stage.meta["trainable"])
    for name, parameter in parameters_by_name(model).items():
        parameter.requires_grad_(name in trainable)
    model.train()
    return programs[stage.name](model)


def carries(stage: StageReader) -> bool:
    """Whether a stage goes on with the optimizer state of what was before it."""
    return any(not optimizer["fresh"] for optimizer in stage.meta["optimizers"])


def replay_stage(
    model: nn.Module, stage: StageReader, prepared: Any, carried: OptimizerState, pace: Pace
) -> tuple[OptimizerState, float]:
    """Run one stage on the model; returns the optimizer's state at its end and the cost.

    Args:
        model: that the program was given.
        stage: as recorded.
        prepared: what its program returned.
        carried: optimizer state that the stage begins with if it did so when it was recorded.
        pace: how coarsely.
    """
    steps = steps_of(prepared, model)
    if steps is None:
        raise cannot_step(stage, prepared)
    parameters = parameters_by_name(model)
    names = {id(parameter): name for name, parameter in parameters.items()}
    merge = pace.merge if can_merge(stage) else 1
    optimizer = rebuild_optimizer(stage, steps, parameters)
    recorded = recorded_rows(stage)
    if not recorded:
        return carried, 0.0
    handed_on = CarriedState(optimizer, names, merge)
    if carries(stage):
        handed_on.load(carried, recorded[0])
    averages, cost = steps.averages() if isinstance(steps, Averaging) else None, 0.0
    for rows, step in recorded_windows(stage, recorded, steps, Pace(merge, pace.thin)):
        optimizer.zero_grad(set_to_none=True)
        for loss in step.losses:
            loss().backward()
        steps.clip()
        use_settings(optimizer, stage, rows)
        optimizer.step()
        cost += step.share
        if averages is not None:
            for row in rows:
                averages.after_step(row["step"])
    if averages is not None:
        averages.put()
    optimizer.zero_grad(set_to_none=True)
    return handed_on.read(recorded[-1]), cost


def recorded_rows(stage: StageReader) -> list[Row]:
    """The executed steps with what each of them used."""
    return stage.steps().select(["step", "learning_rate", "weight_decay", "beta1", "beta2"]).to_pylist()


def recorded_windows(
    stage: StageReader, rows: Sequence[Row], steps: Steps, pace: Pace
) -> Iterator[tuple[Sequence[Row], Step]]:
    """The recorded steps, several at a time, with the batch of the first one.

    Batches whose step a gradient scaler skipped when the stage was recorded are left out as they were then.
    """
    skipped = stage.skipped_steps()["step"].to_pylist()
    batches = steps.steps(pace.thin)
    for first in range(0, len(rows), pace.merge):
        window = rows[first : first + pace.merge]
        _drop(batches, skipped.count(first))
        step = next(batches, None)
        if step is None:
            raise NotComparableError(
                f"The program of stage '{stage.name}' ran out of batches after {first} of {len(rows)} recorded steps.",
                cause="it has fewer data, larger batches or fewer epochs than the recorded training.",
                fix="build the program with the same data and arguments as the recorded stage.",
            )
        yield window, step
        if first + pace.merge < len(rows):
            _drop(batches, len(window) - 1 + sum(first < at < first + pace.merge for at in skipped))


def _drop(batches: Iterator[Step], count: int) -> None:
    for _ in range(count):
        next(batches, None)


def cannot_step(stage: StageReader, prepared: Any) -> MissingProgramError:
    """The error for a program's answer that nobody knows how to drive."""
    return MissingProgramError(
        f"The program of stage '{stage.name}' returned {type(prepared).__name__}, which cannot be run step by step.",
        cause="it is neither a Trainer, a Fit, a Loop nor an iterable of losses.",
        fix="return one of these (trainer_attrib.analysis.loops.Loop for a plain loop), or use method='retrain'.",
    )
