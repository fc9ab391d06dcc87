"""A recorded stage run again, so that its steps can be visited from the last one back to the first.

States of training (weights, buffers, the optimizer's state) are kept at every so many steps on the way forward; on the
way back each stretch between two of them is run once more with all its states kept. With stretches of sqrt(T) steps
that is a second replay in time, and 2 sqrt(T) states in memory (Griewank 1992, "Achieving logarithmic growth of
temporal and spatial complexity in reverse automatic differentiation", with one level). All batches are kept.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from trainer_attrib.analysis.programs import Loss, Step, Steps, steps_of
from trainer_attrib.analysis.replaying import EXACT, cannot_step, carries, prepare, recorded_rows, recorded_windows
from trainer_attrib.analysis.stepping import CarriedState, Row, rebuild_optimizer, use_settings
from trainer_attrib.analysis.training_state import OptimizerState, TrainingState, put
from trainer_attrib.analysis.unrolled.example_weights import ExampleOutputs
from trainer_attrib.ledger.reader import StageReader
from trainer_attrib.tap.names import buffers_by_name, parameters_by_name

KEPT_BYTES = 2**30
"""States of all steps are kept where they take no more memory than this."""
Gradients = dict[str, Tensor]
"""By name of the weight; what a step gave none is not there."""
Weigh = Callable[[int, int], Tensor | None]
"""Step and micro-batch, both counted from 0 -> weights of its rows; None leaves the loss as it is."""


@dataclass(frozen=True)
class Visit:
    """One step of the stage, with the state that it began with.

    Args:
        number: of the step, counted from 0.
        row: of the steps table.
        step: its batch.
        before: weights that the stage trains, buffers and the optimizer's state, as they were before the step.
        draws: puts back the random numbers that its losses drew.
        gradient: before clipping.
    """

    number: int
    row: Row
    step: Step
    before: TrainingState
    draws: RandomState
    gradient: Gradients


class Trajectory:
    """A stage on a copy of the model that its program was given, and its steps backwards.

    Args:
        model: stands where the stage began, with the optimizer state that it brought along; it is moved.
        stage: as recorded.
        start: that state.
        programs: of the stage.
        spacing: steps between kept states; None for every step where they fit into ``KEPT_BYTES``, else sqrt(T).

    Raises:
        MissingProgramError: the program does not say how its stage runs step by step.
        NotComparableError: the recorded optimizer cannot be rebuilt, or the program ran out of batches.
    """

    def __init__(
        self,
        model: nn.Module,
        stage: StageReader,
        start: TrainingState,
        programs: Any,
        spacing: int | None = None,
    ) -> None:
        self.stage, self.model = stage, model
        put(model, start)
        prepared = prepare(model, stage, programs)
        steps = steps_of(prepared, model)
        if steps is None:
            raise cannot_step(stage, prepared)
        self.steps: Steps = steps
        self.parameters: dict[str, nn.Parameter] = parameters_by_name(model)
        self.optimizer: Optimizer = rebuild_optimizer(stage, steps, self.parameters)
        names = {id(parameter): name for name, parameter in self.parameters.items()}
        owned = [names[id(p)] for group in self.optimizer.param_groups for p in group["params"]]
        self.trained: dict[str, nn.Parameter] = {name: self.parameters[name] for name in owned}
        self.outputs = ExampleOutputs(model)
        self._carried = CarriedState(self.optimizer, names, 1)
        self._spacing = spacing
        self._kept: dict[int, TrainingState] = {}
        self._taken: list[tuple[Row, Step, RandomState]] = []
        self._visits: list[Visit] = []
        self._rows = recorded_rows(stage)
        if carries(stage) and self._rows:
            self._carried.load(start.optimizer, self._rows[0])

    @property
    def length(self) -> int:
        """Recorded steps."""
        return len(self._rows)

    @property
    def carries(self) -> bool:
        """Whether the stage went on with the optimizer state of the one before it."""
        return carries(self.stage)

    def forward(self, weigh: Weigh | None = None, *, keep: bool = True) -> None:
        """Run the stage to its end.

        Args:
            weigh: weights of the examples' losses, other than 1.
            keep: what is needed to visit its steps.
        """
        states, spacing = RandomStates(), self._distance()
        for number, (rows, step) in enumerate(recorded_windows(self.stage, self._rows, self.steps, EXACT)):
            draws = states.now()
            if keep:
                self._taken.append((rows[-1], step, draws))
            before = self._state(rows[-1]) if keep and number % spacing == 0 else None
            gradient = self._take(number, step, rows[-1], weigh)
            if before is not None and spacing == 1:
                self._visits.append(Visit(number, rows[-1], step, before, draws, gradient))
            elif before is not None:
                self._kept[number] = before
        self.optimizer.zero_grad(set_to_none=True)

    def backwards(self) -> Iterator[Visit]:
        """The steps, last one first. Between two of them the model stands anywhere."""
        last = len(self._taken)
        for first in sorted(self._kept, reverse=True):
            self._visits = self._stretch(first, last)
            del self._kept[first]
            last = first
            while self._visits:
                yield self._visits.pop()
        while self._visits:
            yield self._visits.pop()

    def stand(self, visit: Visit) -> None:
        """Put the model where a step began."""
        put(self.model, visit.before)
        visit.draws.restore()

    def optimizer_state(self) -> OptimizerState:
        """At the end, for the next stage."""
        return self._carried.read(self._rows[-1]) if self._rows else {}

    def _stretch(self, first: int, last: int) -> list[Visit]:
        put(self.model, self._kept[first])
        self.optimizer.state.clear()
        self._carried.load(self._kept[first].optimizer, self._taken[first][0])
        visits = []
        for number in range(first, last):
            row, step, draws = self._taken[number]
            before = self._kept[first] if number == first else self._state(row)
            draws.restore()
            visits.append(Visit(number, row, step, before, draws, self._take(number, step, row, None)))
        return visits

    def _take(self, number: int, step: Step, row: Row, weigh: Weigh | None) -> Gradients:
        """One optimizer step; returns its gradient before clipping."""
        self.optimizer.zero_grad(set_to_none=True)
        for index, loss in enumerate(step.losses):
            weights = None if weigh is None else weigh(number, index)
            (loss() if weights is None else self._weighted(loss, weights)).backward()
        found = {n: p.grad.detach().clone() for n, p in self.trained.items() if p.grad is not None}
        self.steps.clip()
        use_settings(self.optimizer, self.stage, [row])
        self.optimizer.step()
        return found

    def _weighted(self, loss: Loss, weights: Tensor) -> Tensor:
        with self.outputs.watched():
            return self.outputs.weighted(loss, weights)

    def _state(self, row: Row) -> TrainingState:
        weights = {name: p.detach().clone() for name, p in self.trained.items()}
        buffers = {name: b.detach().clone() for name, b in buffers_by_name(self.model).items()}
        return TrainingState(weights, buffers, self._carried.read(row))

    def _distance(self) -> int:
        if self._spacing is None:
            total, kinds = len(self._rows), 4  # the weight, its two moments and its gradient
            size = sum(p.numel() * p.element_size() for p in self.trained.values())
            self._spacing = 1 if kinds * size * total <= KEPT_BYTES else math.isqrt(total)
        return self._spacing


@dataclass(frozen=True)
class RandomState:
    """Where the generators of random numbers stand; equal parts are shared with the state before."""

    python: Any
    numeric: Any
    torch: Tensor
    devices: Sequence[Tensor]

    def restore(self) -> None:
        """Draw from here on."""
        random.setstate(self.python)
        np.random.set_state(self.numeric)
        torch.set_rng_state(self.torch)
        if self.devices:
            torch.cuda.set_rng_state_all(list(self.devices))


class RandomStates:
    """Takes states of the generators; what has not been drawn from since is stored once."""

    def __init__(self) -> None:
        self._last: RandomState | None = None

    def now(self) -> RandomState:
        """The present state."""
        python, numeric, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
        devices = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
        if (last := self._last) is not None:
            python = last.python if python == last.python else python
            same = all(np.array_equal(a, b) for a, b in zip(numeric, last.numeric, strict=True))
            numeric = last.numeric if same else numeric
            cpu = last.torch if torch.equal(cpu, last.torch) else cpu
        self._last = RandomState(python, numeric, cpu, devices)
        return self._last
