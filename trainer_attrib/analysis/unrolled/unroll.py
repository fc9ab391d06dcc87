"""The exact derivative of every query at the end of training with respect to the weight of each example's loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from trainer_attrib.analysis.effects.lineage import Lineage
from trainer_attrib.analysis.effects.slopes import gradients
from trainer_attrib.analysis.programs import check_programs
from trainer_attrib.analysis.training_state import TrainingState, copy_model, random_states_kept, state_of
from trainer_attrib.analysis.unrolled.backward import BackwardSweep, StepScores
from trainer_attrib.analysis.unrolled.trained_rows import TrainedRows
from trainer_attrib.analysis.unrolled.trajectory import Trajectory
from trainer_attrib.analysis.unrolled.update import Adjoint, wide
from trainer_attrib.errors import NotComparableError
from trainer_attrib.ledger.reader import StageReader
from trainer_attrib.progress import progress
from trainer_attrib.tap.names import parameters_by_name


@dataclass(frozen=True)
class Effort:
    """How the work is divided.

    Args:
        spacing: steps between the states of training that are kept; None for every step where they take less than a
            gigabyte, else the root of the number of steps. Scores do not depend on it.
        at_once: queries that share a backward pass: memory against time.
    """

    spacing: int | None = None
    at_once: int = 32


@dataclass
class StageDerivatives:
    """What the weights of a stage's examples do.

    Args:
        stage: whose.
        rows: its examples.
        scores: derivative of each query with respect to the weight of each example's loss, float64 [Q, N].
        end: where the replay ended.
        drift: distance of the replay's end from the recorded one, over what the stage changed; 0 is bit for bit.
        moved_buffers: buffers that training changed, whose part in the behaviors is not counted.
        functions: of the loss, with a backward pass of their own, which may not be differentiable.
    """

    stage: StageReader
    rows: TrainedRows
    scores: np.ndarray
    end: TrainingState
    drift: float
    moved_buffers: list[str]
    functions: list[str] = field(default_factory=list)
    _outside: float = field(default=0.0)
    _within: float = field(default=0.0)

    @property
    def outside(self) -> float:
        """What part of the losses' gradient passed by the outputs, so that no example has it; relative to the sum of
        the absolute scores of all steps."""
        return self._outside / self._within if self._within else 0.0

    def add(self, found: StepScores) -> None:
        """Of one micro-batch."""
        examples = self.rows.at.get((found.number, found.micro_batch), np.zeros(0, np.int64))
        scores = found.scores.numpy()
        for query, row in enumerate(scores):
            np.add.at(self.scores[query], examples, row)
        self._outside += float(np.abs(scores.sum(1) - found.gradient.numpy()).sum())
        self._within += float(np.abs(scores).sum())


def unroll(lineage: Lineage, stages: Sequence[StageReader], effort: Effort) -> list[StageDerivatives]:
    """Run the chosen stages and all later ones again, each from its recorded start, and carry the queries' gradients
    back through them, last stage first. The model and all random states stay as they are.

    Args:
        lineage: with the behaviors, and programs of the first chosen stage and all later ones.
        stages: whose examples are scored.
        effort: how the work is divided.

    Returns:
        One for each chosen stage, in their order.

    Raises:
        MissingProgramError: a stage has no program, or one that does not say how it runs step by step.
        NotComparableError: the model does not have all weights that a stage trained, an optimizer is not known, or the
            ledger does not say which examples were in which step.
        AnalysisError: a loss cannot be differentiated twice.
    """
    chosen = [stage.name for stage in stages]
    first = min(i for i, stage in enumerate(lineage.stages) if stage.name in chosen)
    through = list(lineage.stages[first:])
    check_programs(through, lineage.programs)
    lineage.timeline.check_trainable(through)
    rows = {stage.name: TrainedRows.of(stage) for stage in stages}
    adjoint, found = _begin(lineage, through), dict[str, StageDerivatives]()
    for stage in reversed(through):
        here = {name for other in through[: through.index(stage) + 1] for name in other.meta["trainable"]}
        adjoint = Adjoint({n: w for n, w in adjoint.weights.items() if n in here}, adjoint.moments)
        with random_states_kept():
            path = Trajectory(copy_model(lineage.model), stage, lineage.start(stage), lineage.programs, effort.spacing)
            path.forward()
            scored = _derivatives(lineage, path, rows.get(stage.name), adjoint.queries)
            sweep = BackwardSweep(path, adjoint, scored.rows.sizes, effort.at_once)
            for step in progress(sweep.run(), f"unrolling {stage.name}", path.length):
                scored.add(step)
        scored.functions = sweep.functions or []
        adjoint = sweep.adjoint if path.carries else Adjoint(sweep.adjoint.weights)
        found[stage.name] = scored
    return [found[name] for name in chosen]


def _begin(lineage: Lineage, stages: Sequence[StageReader]) -> Adjoint:
    """The gradients of all queries at the model's weights."""
    names = {name for stage in stages for name in stage.meta["trainable"]}
    places = {n: p for n, p in parameters_by_name(lineage.model).items() if n in names}
    asked = {name: place.detach() for name, place in places.items()}
    each = [gradient for behavior in lineage.behaviors for gradient in gradients(lineage.model, behavior, asked)]
    like = {name: wide(place.detach()[:0]) for name, place in places.items()}
    return Adjoint({name: torch.stack([gradient[name] for gradient in each]).to(like[name]) for name in places})


def _derivatives(lineage: Lineage, path: Trajectory, rows: TrainedRows | None, queries: int) -> StageDerivatives:
    rows = rows or TrainedRows([], np.zeros(0, np.int64), np.zeros(0, np.int64), {})
    end = state_of(path.model, path.optimizer_state())
    start, recorded = lineage.start(path.stage), lineage.end(path.stage).weights
    final = {name: p.detach().cpu() for name, p in parameters_by_name(lineage.model).items()}
    missed = _distance({n: recorded.get(n, final[n]) for n in path.trained}, end.weights)
    if not np.isfinite(missed):
        raise NotComparableError(
            f"Stage '{path.stage.name}' diverged when it was run again.",
            cause="the program differs from the recorded training: its data, batches or loss.",
            fix="build the program with the same data and arguments as the recorded stage.",
        )
    changed = _distance({n: start.weights.get(n, final[n]) for n in path.trained}, end.weights)
    buffers = [n for n, b in start.buffers.items() if b.is_floating_point() and not torch.equal(b, end.buffers[n])]
    drift = missed / changed if changed else float(missed > 0)
    return StageDerivatives(path.stage, rows, np.zeros((queries, len(rows.ids))), end, drift, buffers)


def _distance(first: dict[str, Tensor], second: dict[str, Tensor]) -> float:
    squares = [(value.double() - second[name].double()).square().sum() for name, value in first.items()]
    return float(torch.stack(squares).sum().sqrt()) if squares else 0.0
