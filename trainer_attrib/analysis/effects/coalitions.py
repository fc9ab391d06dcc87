"""What training would have led to with any subset of its stages, and the stages' Shapley values.

Skip effects do not add up to what training did. Shapley values do: a stage's is the mean, over all orders in which
stages could be left out, of what leaving it out then changes (Shapley 1953).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from trainer_attrib.analysis.effects.estimate import Estimate, differences
from trainer_attrib.analysis.effects.lineage import Lineage, Values
from trainer_attrib.analysis.programs import check_programs
from trainer_attrib.analysis.replaying import Pace, Replayed, replay
from trainer_attrib.analysis.training_state import TrainingState
from trainer_attrib.errors import ConfigurationError
from trainer_attrib.ledger.reader import StageReader

MOST = 4
Coalition = frozenset[int]
"""Numbers of the stages that are executed, in the order of training; the others are skipped."""


@dataclass(frozen=True)
class _Worth:
    """Behaviors of a coalition's model, read off its weights, and from the difference to the replayed recording."""

    values: Values
    other: Values


@dataclass
class Coalitions:
    """Models of all subsets of a lineage's stages.

    A coalition of the first stages is known exactly: it is what was recorded. Any other one that ends with stage k is
    replayed from the coalition without k, and moved by what a replay of k from the recorded start of k misses of its
    recorded end (a control variate). That is 2^N - 2 replays of one stage, N being the number of stages.
    """

    lineage: Lineage
    pace: Pace
    cost: float = 0.0
    _twins: dict[int, Replayed] = field(default_factory=dict)
    _twin_values: dict[int, Values] = field(default_factory=dict)

    def worths(self) -> dict[Coalition, _Worth]:
        """Behaviors of every coalition."""
        first = self.lineage.start(self.lineage.stages[0])
        start = self.lineage.measure(first)
        found = {Coalition(): _Worth(start, start)}
        states: dict[Coalition, TrainingState] = {Coalition(): first}
        for number in range(len(self.lineage.stages)):
            for known, state in list(states.items()):
                joined = known | {number}
                states[joined], found[joined] = self._joined(known, state, found[known], number)
        return found

    def _joined(
        self, known: Coalition, state: TrainingState, worth: _Worth, number: int
    ) -> tuple[TrainingState, _Worth]:
        stage = self.lineage.stages[number]
        end = self.lineage.end(stage)
        if len(known) == number:  # the coalition of all stages so far
            values = self.lineage.measure(end)
            return end, _Worth(values, values)
        run, twin = self._run(state, stage), self._twin(number)
        weights = {name: end.weights.get(name, twin.state.weights[name]) for name in run.state.weights}
        moved = {n: w.double() + run.state.weights[n].double() - twin.state.weights[n] for n, w in weights.items()}
        missed = differences(self.lineage.measure(end), self._twin_values[number])
        other = [a + b for a, b in zip(self.lineage.measure(run.state), missed, strict=True)]
        reached = TrainingState(moved, run.state.buffers, run.state.optimizer)
        return reached, _Worth(self.lineage.measure(reached), other)

    def _twin(self, number: int) -> Replayed:
        if number not in self._twins:
            stage = self.lineage.stages[number]
            self._twins[number] = self._run(self.lineage.start(stage), stage)
            self._twin_values[number] = self.lineage.measure(self._twins[number].state)
        return self._twins[number]

    def _run(self, state: TrainingState, stage: StageReader) -> Replayed:
        run = replay(self.lineage.model, state, [stage], self.lineage.programs, self.pace)
        self.cost += run.cost
        return run


def shapley(lineage: Lineage, pace: Pace) -> list[Estimate]:
    """Shapley value of every stage for every behavior; their sum is what all of training changed.

    The error bar is the disagreement between two ways to read a coalition's behaviors off its replay.

    Raises:
        ConfigurationError: more stages than four.
        MissingProgramError: a stage after the first has no program.
        NotComparableError: a stage trained weights that the model does not have.
    """
    count = len(lineage.stages)
    if count > MOST:
        raise ConfigurationError(
            f"Shapley values of {count} stages need {2**count - 2} replays of a stage.",
            cause=f"they are computed for up to {MOST} stages.",
            fix="use stage_effects, whose interaction says by how much effects do not add up.",
        )
    check_programs(lineage.stages[1:], lineage.programs)
    lineage.timeline.check_trainable(lineage.stages[1:])
    coalitions = Coalitions(lineage, pace)
    worths = coalitions.worths()
    found = []
    for player in range(count):
        values = _shapley(worths, player, count, other=False)
        other = _shapley(worths, player, count, other=True)
        bars = [(v - o).abs() for v, o in zip(values, other, strict=True)]
        found.append(Estimate(values, bars, "replayed coalitions", coalitions.cost / count, method="shapley"))
    return found


def _shapley(worths: dict[Coalition, _Worth], player: int, count: int, *, other: bool) -> Values:
    behaviors = len(next(iter(worths.values())).values)
    totals: list[Tensor] = [torch.zeros(())] * behaviors
    for rest in _subsets(set(range(count)) - {player}):
        share = math.factorial(len(rest)) * math.factorial(count - len(rest) - 1) / math.factorial(count)
        with_it, without = worths[rest | {player}], worths[rest]
        gained = differences(with_it.other, without.other) if other else differences(with_it.values, without.values)
        totals = [total + share * gain for total, gain in zip(totals, gained, strict=True)]
    return totals


def _subsets(of: set[int]) -> Iterator[Coalition]:
    for size in range(len(of) + 1):
        yield from (Coalition(chosen) for chosen in itertools.combinations(sorted(of), size))
