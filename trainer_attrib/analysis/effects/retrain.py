"""Later stages run again as they were, from where the stage began."""

from __future__ import annotations

from dataclasses import dataclass

from trainer_attrib.analysis.displacement import between
from trainer_attrib.analysis.effects.estimate import Estimate, differences, zeros
from trainer_attrib.analysis.effects.lineage import Lineage
from trainer_attrib.analysis.programs import check_programs
from trainer_attrib.analysis.retraining import retrain
from trainer_attrib.analysis.training_state import state_of
from trainer_attrib.ledger.reader import StageReader


@dataclass(frozen=True)
class Retrain:
    """Run the later stages again from the stage's start: the definition of the skip effect.

    Exact for the recorded batches, order and learning rates if the programs are those of the recording, which
    ``Analyzer.closure`` checks. An optimizer state that was carried on from one stage to the next is carried on past
    the stage that is left out, as it stood when that stage began.
    """

    name = "retrain"
    instead = ""
    caveat = (
        "retrain is exact for the recorded batches and order; another data order would differ by the noise of "
        "training, which is not measured here"
    )

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
        """Every later step."""
        return float(lineage.later_steps(stage))

    def estimate(self, lineage: Lineage, stage: StageReader) -> Estimate:
        """Measured at the retrained weights."""
        state = retrain(lineage.model, lineage.start(stage), lineage.later(stage), lineage.programs)
        effects = differences(lineage.final, lineage.measure(state))
        away = between(state_of(lineage.model), state)
        return Estimate(effects, zeros(effects), "retrained weights", self.price(lineage, stage), away)
