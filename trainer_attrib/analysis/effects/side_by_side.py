"""How a later stage carries a displacement: its optimizer twice, on the same few batches.

A stage is cut into pieces of consecutive steps with one thinned batch each. One optimizer gets the batch's gradient at
the recorded weights, the other one that at the recorded weights moved by the displacement, both clipped as training
clips; each takes the piece's steps, at the recorded learning rates, as if every step had that gradient. What the two
are apart afterwards is the displacement. Momentum, moments, their bias at a stage's beginning and decay are the
optimizer's own in both, and the small batch's noise, which makes second moments larger, is in both as well.

With every step a piece of its own and whole batches it is retraining, but for recorded weights that are interpolated.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from trainer_attrib.analysis.displacement import Displacement
from trainer_attrib.analysis.effects.between_snapshots import BetweenSnapshots
from trainer_attrib.analysis.effects.pieces import Piece, steps_at_once
from trainer_attrib.analysis.effects.pull import norm, ratio
from trainer_attrib.analysis.programs import Steps
from trainer_attrib.analysis.replaying import carries, recorded_rows
from trainer_attrib.analysis.stepping import CarriedState, Row, rebuild_optimizer, use_settings
from trainer_attrib.analysis.training_state import OptimizerState, TrainingState, random_states_kept, standing
from trainer_attrib.ledger.reader import StageReader
from trainer_attrib.tap.names import parameters_by_name

Named = Mapping[str, Tensor]
GRADIENTS = 2.0
"""Of its batch, that every piece costs."""


class Displaced(NamedTuple):
    """What is left of a stage's removal at some time of later training.

    Args:
        weights: how far the weights are from the recorded ones.
        optimizer: state that the optimizer has there, for a stage that carries it on.
    """

    weights: Displacement
    optimizer: OptimizerState


class Closure(NamedTuple):
    """Whether a few batches move weights as training did, in norms over all weights.

    Args:
        missed: how far from the recorded weights they end.
        moved: how far training moved them.
    """

    missed: float
    moved: float

    def then(self, later: Closure) -> Closure:
        """Both stages together."""
        return Closure(math.hypot(self.missed, later.missed), math.hypot(self.moved, later.moved))

    @property
    def share(self) -> float:
        """What is missed of the movement; infinite where that is not finite."""
        return ratio(self.missed, self.moved)


class SideBySide:
    """A stage's optimizer at the recorded weights and at displaced ones, from the stage's start.

    Args:
        model: on which gradients are computed; it stands at the stage's start.
        stage: that the optimizers follow.
        steps: its program, for how gradients are clipped and for the optimizer's class.
        recorded: optimizer state with which the stage began, if it carried one on.
        displaced: at the stage's start. Of weights that the stage does not train the displacement stays.
    """

    def __init__(
        self, model: nn.Module, stage: StageReader, steps: Steps, recorded: OptimizerState, displaced: Displaced
    ) -> None:
        self._model, self._places, self._clip = model, parameters_by_name(model), steps.clip
        self._rows, self._at_once, self._displacement = recorded_rows(stage), steps_at_once(stage), displaced.weights
        self.cost = 0.0
        here = {name: self._places[name].detach() for name in BetweenSnapshots(stage).trained}
        there = {name: weight for name, weight in self._moved(here).items() if name in here}
        self._here = _Arm(stage, steps, here, recorded, self._at_once)
        self._there = _Arm(stage, steps, there, displaced.optimizer, self._at_once)

    def take(self, piece: Piece, weights: Named) -> None:
        """A piece's steps, with the gradients of its batch; ``weights`` are the recorded ones there."""
        rows = self._rows[piece.first : piece.last]
        windows = [rows[i : i + self._at_once] for i in range(0, len(rows), self._at_once)]
        for arm, at in ((self._here, weights), (self._there, self._moved(weights))):
            arm.take(windows, self._gradients(piece, at))
        here, there = self._here.weights, self._there.weights
        apart = {name: (there[name].double() - here[name].double()).cpu() for name in here}
        self._displacement = {**self._displacement, **apart}
        self.cost += GRADIENTS * piece.step.share

    def closure(self, end: Named) -> Closure:
        """How the optimizer at the recorded weights ends beside the recorded end of the stage."""
        start = {name: self._places[name].detach() for name in end}
        missed = norm({name: weight.to(end[name].device) - end[name] for name, weight in self._here.weights.items()})
        return Closure(missed, norm({name: end[name] - start[name].to(end[name].device) for name in end}))

    @property
    def displaced(self) -> Displaced:
        """After the steps that were taken; the displacement in float64 on the CPU."""
        return Displaced(self._displacement, self._there.state())

    def _moved(self, weights: Named) -> dict[str, Tensor]:
        """All weights that are displaced, and these."""
        moved = {
            name: weights.get(name, self._places[name].detach()).to(change.device).double() + change
            for name, change in self._displacement.items()
            if name in self._places
        }
        return {**weights, **moved}

    def _gradients(self, piece: Piece, weights: Named) -> dict[str, Tensor]:
        """Of what has one, clipped; the same random numbers in both arms."""
        with standing(self._model, TrainingState(dict(weights))), random_states_kept(), torch.enable_grad():
            torch.manual_seed(piece.first)
            self._model.zero_grad(set_to_none=True)
            for loss in piece.step.losses:
                loss().backward()
            self._clip()
            found = {name: p.grad for name, p in self._places.items() if p.grad is not None}
            self._model.zero_grad(set_to_none=True)
            return found


class _Arm:
    """Copies of the trained weights, and the stage's optimizer over them."""

    def __init__(self, stage: StageReader, steps: Steps, start: Named, carried: OptimizerState, at_once: int) -> None:
        self.weights = {name: _at_least_single(weight) for name, weight in start.items()}
        self._stage, self._optimizer = stage, rebuild_optimizer(stage, steps, self.weights)
        names = {id(weight): name for name, weight in self.weights.items()}
        self._rows, self._state = recorded_rows(stage), CarriedState(self._optimizer, names, at_once)
        if carries(stage):
            self._state.load(carried, self._rows[0])

    def take(self, windows: Sequence[Sequence[Row]], gradients: Named) -> None:
        for name, weight in self.weights.items():
            gradient = gradients.get(name)
            weight.grad = None if gradient is None else gradient.to(weight)
        for rows in windows:
            use_settings(self._optimizer, self._stage, rows)
            self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

    def state(self) -> OptimizerState:
        return self._state.read(self._rows[-1])


def _at_least_single(weight: Tensor) -> Tensor:
    """A copy; of half precision, in which small steps would be lost, a single-precision one."""
    return weight.detach().to(torch.promote_types(weight.dtype, torch.float32), copy=True)
