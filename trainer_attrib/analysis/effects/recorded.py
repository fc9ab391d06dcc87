"""What the recorded weights alone tell: no gradient, no data, no program."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from trainer_attrib.analysis.displacement import subtracted
from trainer_attrib.analysis.effects.estimate import Estimate, differences, during
from trainer_attrib.analysis.effects.lineage import Lineage
from trainer_attrib.ledger.reader import StageReader


@dataclass(frozen=True)
class Change:
    """What happened during the stage: behavior at its end minus behavior at its start. Exact and additive.

    It answers another question than the skip effect: later stages may undo, keep or amplify what happened here.
    """

    name = "change"
    instead = ""
    caveat = "change is what happened during a stage; it is not what the model would be without the stage"

    def check(self, lineage: Lineage, stage: StageReader) -> None:
        """Nothing can be missing: both ends are always recorded."""

    def price(self, lineage: Lineage, stage: StageReader) -> float:
        """Nothing is run again."""
        return 0.0

    def estimate(self, lineage: Lineage, stage: StageReader) -> Estimate:
        """Measured at both ends; no error."""
        found = during(lineage, stage)
        return Estimate(found.effects, found.error_bars, found.read_out)


@dataclass(frozen=True)
class Subtract:
    """The stage's displacement taken out of the final weights, shrunk by later weight decay, and measured.

    Exact for the last stage. For earlier ones it is a first look: it ignores how later stages would have trained from
    other weights, and nothing in it tests that. The error bar is therefore the larger of its disagreement with the
    stage's own change and its own size (smaller bars miss the truth more often than not).
    """

    name = "subtract"
    instead = "method='replay', or method='propagate' if later stages were gentle"
    caveat = (
        "subtract is a first look: it ignores how later stages would have trained from other weights, so that for all "
        "stages but the last not even its sign is certain"
    )

    def check(self, lineage: Lineage, stage: StageReader) -> None:
        """Nothing can be missing: both ends are always recorded."""

    def price(self, lineage: Lineage, stage: StageReader) -> float:
        """Nothing is run again."""
        return 0.0

    def estimate(self, lineage: Lineage, stage: StageReader) -> Estimate:
        """Measured at the moved weights."""
        removal = subtracted(lineage.timeline.change(stage), lineage.later(stage))
        effects = differences(lineage.final, lineage.measure_moved(removal))
        bars = [
            torch.maximum((e - c).abs(), e.abs()) for e, c in zip(effects, during(lineage, stage).effects, strict=True)
        ]
        return Estimate(effects, bars, "moved weights", displacement=removal)
