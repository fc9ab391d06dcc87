"""Later stages run again coarsely, twice: with the stage and without it, on the same batches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from trainer_attrib.analysis.displacement import Displacement, between
from trainer_attrib.analysis.effects.estimate import Estimate, differences, pooled
from trainer_attrib.analysis.effects.lineage import Lineage, Values
from trainer_attrib.analysis.programs import check_programs
from trainer_attrib.analysis.replaying import Pace, replay
from trainer_attrib.ledger.reader import StageReader

ReadOut = Literal["diff", "cv", "plain"]
ERROR_SCALE = 1.2
"""Brings four of five true errors within the bar: measured in six regimes of ``benchmarks/stage_effects.py``, three
seeds, and checked on three others (``docs/log.md``)."""


@dataclass(frozen=True)
class Arms:
    """Values of all behaviors after the two replays, and how far they can be trusted.

    Args:
        with_it: replayed from the stage's end.
        without_it: replayed from the stage's start.
        moved: at the final weights, moved by the difference of the two.
        displacement: that difference, without minus with.
        cost: of both.
    """

    with_it: Values
    without_it: Values
    moved: Values
    displacement: Displacement
    cost: float
    finite: bool

    def effects(self, final: Values, read_out: ReadOut) -> Values:
        """The stage's effect by one of the read-outs."""
        first = {"diff": self.with_it, "cv": final, "plain": final}[read_out]
        second = {"diff": self.without_it, "cv": self.moved, "plain": self.without_it}[read_out]
        return differences(first, second)

    def error_bars(self, final: Values) -> Values:
        """How uncertain every effect is, from what the replays themselves disagree about: the read-outs ``cv`` and
        ``diff``, and how far the replay with the stage ends from the trained model. Infinite where one diverged."""
        if not self.finite:
            return [torch.full_like(value, torch.inf) for value in final]
        apart = differences(self.effects(final, "cv"), self.effects(final, "diff"))
        return pooled(apart, differences(final, self.with_it), scale=ERROR_SCALE)

    def closure(self, final: Values) -> float:
        """How far the replay with the stage ends from the trained model, relative to the effect; 0 is exact."""
        missed, effect = (_norm(differences(self.with_it, other)) for other in (final, self.without_it))
        return missed / effect if effect > 0 else float("inf" if missed > 0 else 0)


@dataclass(frozen=True)
class Replay:
    """The stage's effect from two coarse replays of the later stages, one from its start and one from its end.

    Both draw the same batches and random numbers: most of what coarseness and sampling do is in both and cancels.

    Read-outs: ``diff``, the difference of the two replayed models; ``cv``, the trained model against the trained model
    moved by the difference of their weights (the replay with the stage is a control variate); ``plain``, the trained
    model against the replayed one without the stage, best where training itself is chaotic.

    Args:
        merge: so many optimizer steps are run again as one.
        thin: one in so many examples of a batch is used.
        read_out: ``"diff"``, ``"cv"`` or ``"plain"``.
    """

    merge: int = 2
    thin: int = 4
    read_out: ReadOut = "cv"

    name = "replay"
    instead = "Replay(merge=1, thin=4) or method='retrain'"
    caveat = ""

    def check(self, lineage: Lineage, stage: StageReader) -> None:
        """Later stages must have programs, and the model all weights that they train.

        Raises:
            MissingProgramError: a later stage has no program.
            NotComparableError: a later stage trained weights that the model does not have.
        """
        later = lineage.later(stage)
        check_programs(later, lineage.programs)
        lineage.timeline.check_trainable(later)

    def price(self, lineage: Lineage, stage: StageReader) -> float:
        """Two replays."""
        return 2 * lineage.later_steps(stage) / (self.merge * self.thin)

    def estimate(self, lineage: Lineage, stage: StageReader) -> Estimate:
        """Measured at the replayed weights.

        Raises:
            MissingProgramError: a program does not say how its stage runs step by step.
        """
        return self.read(lineage, run_arms(lineage, stage, Pace(self.merge, self.thin)))

    def read(self, lineage: Lineage, arms: Arms) -> Estimate:
        """The estimate that two replays give."""
        effects, bars = arms.effects(lineage.final, self.read_out), arms.error_bars(lineage.final)
        return Estimate(effects, bars, f"replayed weights, {self.read_out}", arms.cost, arms.displacement)


def run_arms(lineage: Lineage, stage: StageReader, pace: Pace) -> Arms:
    """Replay the later stages from a stage's end and from its start."""
    later = lineage.later(stage)
    with_it, without_it = (
        replay(lineage.model, start, later, lineage.programs, pace)
        for start in (lineage.end(stage), lineage.start(stage))
    )
    moved = between(with_it.state, without_it.state)
    return Arms(
        lineage.measure(with_it.state), lineage.measure(without_it.state), lineage.measure_moved(moved), moved,
        with_it.cost + without_it.cost, with_it.state.finite and without_it.state.finite,
    )  # fmt: skip


def _norm(values: Values) -> float:
    return float(torch.cat(values).norm())
