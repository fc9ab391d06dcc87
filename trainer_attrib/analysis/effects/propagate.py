"""The stage's displacement carried through a few batches of each later stage, without running them again."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch

from trainer_attrib.analysis.displacement import Displacement
from trainer_attrib.analysis.effects.between_snapshots import BetweenSnapshots
from trainer_attrib.analysis.effects.estimate import Estimate, differences, pooled
from trainer_attrib.analysis.effects.lineage import Lineage, Values
from trainer_attrib.analysis.effects.passage import Passage
from trainer_attrib.analysis.effects.pieces import Effort
from trainer_attrib.analysis.effects.pull import pull
from trainer_attrib.analysis.effects.recorded import Subtract
from trainer_attrib.analysis.effects.side_by_side import GRADIENTS, Closure, Displaced
from trainer_attrib.analysis.effects.slopes import slopes_along
from trainer_attrib.analysis.programs import check_programs
from trainer_attrib.analysis.stepping import can_merge
from trainer_attrib.errors import NotComparableError
from trainer_attrib.ledger.reader import StageReader
from trainer_attrib.tap.names import parameters_by_name

ReadOut = Literal["moved weights", "dot"]
ERROR_SCALE = 1.2
"""Brings more than four of five true errors within the bar: measured in six regimes on seeds that are not those of
``benchmarks/stage_effects.py`` (``docs/log.md``)."""


class Carried(NamedTuple):
    """A displacement after all later stages.

    Args:
        displacement: of the final weights.
        closure: of all later stages together.
        cost: in gradients of a batch.
    """

    displacement: Displacement
    closure: Closure
    cost: float


@dataclass(frozen=True)
class Propagate:
    """The weights without the stage, from its displacement and a few batches of each later stage.

    Each later stage is cut into pieces of one thinned batch, and its optimizer runs twice through them: on gradients at
    the recorded weights, and at the recorded weights moved by the displacement; what the two are apart is carried on
    (``side_by_side.py``). What it costs does not grow with the length of a stage: four gradients of a batch. Good while
    later stages train gently (learning rates well below those of the stage); with later learning rates like the
    stage's own it misleads, and ``replay`` is worth its price.

    Gradients of behaviors are carried back by the linear flow of the Gauss-Newton matrix in the optimizer's metric
    (``passage.py``).

    The error bar is a share of the effect and of its distance to ``subtract``, which leaves out what later stages did:
    the share by which they changed the displacement (``pull.py``), times what the few batches, at the recorded weights,
    miss of the movement that was recorded: as much is taken to be wrong of what they do to the displacement.

    Args:
        products: of the curvature with a vector, per piece, to carry gradients back.
        batches: whole batches' worth of examples used of a later stage.
        thin: a piece has one in so many of a batch's examples: a later stage has about ``batches * thin`` pieces.
        read_out: ``"moved weights"``, or ``"dot"``: behavior gradients at the final weights times the displacement.
    """

    products: int = 2
    batches: float = 2.0
    thin: int = 4
    read_out: ReadOut = "moved weights"

    name = "propagate"
    instead = "method='replay'"
    caveat = (
        "propagate sees a few batches of each later stage, and misleads where later stages train as fast as the stage "
        "did"
    )

    def check(self, lineage: Lineage, stage: StageReader) -> None:
        """Later stages must have programs and an optimizer whose map is known; the model all weights that they train.

        Raises:
            MissingProgramError: a later stage has no program.
            NotComparableError: a later stage trained weights that the model does not have, or by an optimizer whose
                steps cannot be merged.
        """
        later = lineage.later(stage)
        check_programs(later, lineage.programs)
        lineage.timeline.check_trainable(later)
        for one in later:
            _check_optimizer(one)

    def check_back(self, lineage: Lineage, stage: StageReader) -> None:
        """What carrying a gradient back to a stage's end needs: as :meth:`check`, and second moments that Adam had.

        Raises:
            MissingProgramError: a later stage has no program.
            NotComparableError: as of :meth:`check`, or second moments are not recorded.
        """
        self.check(lineage, stage)
        for later in lineage.later(stage):
            _check_moments(later)

    def price(self, lineage: Lineage, stage: StageReader) -> float:
        """Two gradients of every piece of all later stages."""
        return GRADIENTS * sum(self._effort.worth(later) for later in lineage.later(stage))

    def estimate(self, lineage: Lineage, stage: StageReader) -> Estimate:
        """Read off at the final weights moved by the carried displacement.

        Raises:
            MissingProgramError: a program does not say how its stage runs step by step.
        """
        removal, closure, cost = self.carry(lineage, stage)
        effects = self._read(lineage, removal)
        simple = Subtract().estimate(lineage, stage)
        share = ERROR_SCALE * pull(removal, simple.displacement or {}) * closure.share
        bars = pooled(effects, differences(effects, simple.effects), scale=share)
        return Estimate(effects, bars, self.read_out, cost, removal)

    def carry(self, lineage: Lineage, stage: StageReader) -> Carried:
        """The displacement of the final weights that leaving a stage out would leave."""
        removed = {name: -change for name, change in lineage.timeline.change(stage).items()}
        displaced, closure, cost = Displaced(removed, lineage.start(stage).optimizer), Closure(0.0, 0.0), 0.0
        for later in lineage.later(stage):
            passage = Passage(lineage, later, self._effort)
            displaced = passage.forward(displaced)
            closure, cost = closure.then(passage.closure), cost + passage.cost
        return Carried(displaced.weights, closure, cost)

    def carry_back(self, lineage: Lineage, stage: StageReader, gradient: Displacement) -> Displacement:
        """A gradient with respect to the final weights -> with respect to those at a stage's end: the adjoint of
        :meth:`carry`. ``inner(carry_back(gradient), change)`` is a stage's effect on a behavior to first order.

        Args:
            lineage: as for :meth:`estimate`.
            stage: at whose end.
            gradient: of a behavior or a sum of behaviors, by parameter name, float64; what it does not name is 0.
        """
        return next(found for one, found in self.sweep(lineage, gradient) if one.name == stage.name)

    def sweep(self, lineage: Lineage, gradient: Displacement) -> Iterator[tuple[StageReader, Displacement]]:
        """The gradient at the end of every stage, last to first: later stages are passed through once for all."""
        places = parameters_by_name(lineage.model)
        trained = {name for stage in lineage.stages for name in stage.meta["trainable"] if name in places}
        gradient = {name: gradient.get(name, torch.zeros(places[name].shape).double()) for name in sorted(trained)}
        later = None
        for stage in reversed(lineage.stages):
            if later is not None:
                gradient = Passage(lineage, later, self._effort).backward(gradient)
            yield stage, gradient
            later = stage

    @property
    def _effort(self) -> Effort:
        return Effort(self.products, self.batches, self.thin)

    def _read(self, lineage: Lineage, removal: Displacement) -> Values:
        if self.read_out == "dot":
            return [-slopes_along(lineage.model, behavior, removal) for behavior in lineage.behaviors]
        return differences(lineage.final, lineage.measure_moved(removal))


def _check_optimizer(stage: StageReader) -> None:
    optimizers = stage.meta["optimizers"]
    if not can_merge(stage):
        kinds = " and ".join(optimizer["class"].rpartition(".")[2] for optimizer in optimizers)
        raise NotComparableError(
            f"Stage '{stage.name}' was trained by {kinds}, through which displacements cannot be propagated.",
            cause="this is known for one optimizer: AdamW, Adam, or SGD without dampening.",
            fix="use method='replay', which runs the stage coarsely with its own optimizer, or method='retrain'.",
        )


def _check_moments(stage: StageReader) -> None:
    if BetweenSnapshots(stage).adaptive and not any("moments" in s for s in stage.meta["snapshots"]):
        raise NotComparableError(
            f"Stage '{stage.name}' has no recorded second moments, by which its optimizer scaled the gradients.",
            cause="its weights were sharded over several processes, or an earlier version recorded it.",
            fix="record the stage in one process, or ask for effects of whole stages, which need none.",
        )
