"""Which examples of an earlier stage matter for the final model, through all stages after it.

A behavior's gradient at the final weights is carried back through the later stages (the adjoint of ``propagate``) to
the end of the earlier one, and compared there with the rows of its examples (Chen et al. 2020, "Multi-stage influence
function", for the question; carried by the flow of training instead of inverse Hessians at optima).
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from trainer_attrib.analysis.behavior import Behavior
from trainer_attrib.analysis.displacement import Displacement
from trainer_attrib.analysis.effects.lineage import Lineage
from trainer_attrib.analysis.effects.propagate import Propagate
from trainer_attrib.analysis.effects.slopes import gradients
from trainer_attrib.analysis.query_sketches import sketch_vectors
from trainer_attrib.ledger.reader import StageReader
from trainer_attrib.tap.names import parameters_by_name


class CarriedQueries:
    """Gradients of all queries at the ends of chosen stages, sketched as the stages' rows were.

    They are held on the CPU, one vector of weight space per query and stage.

    Raises:
        BehaviorError: a behavior has no gradient.
        AnalysisError: a later stage cannot be passed through (``Propagate.check_back``).
    """

    def __init__(
        self, lineage: Lineage, behaviors: Sequence[Behavior], stages: Sequence[StageReader], carry: Propagate
    ) -> None:
        self._lineage = lineage
        wanted = {stage.name for stage in stages}
        earliest = next(stage for stage in lineage.stages if stage.name in wanted)
        carry.check_back(lineage, earliest)
        places = {name: p.detach() for name, p in parameters_by_name(lineage.model).items()}
        self._carried: dict[str, list[Displacement]] = {name: [] for name in wanted}
        for behavior in behaviors:
            for gradient in gradients(lineage.model, behavior, places):
                for stage, back in carry.sweep(lineage, gradient):
                    if stage.name in wanted:
                        self._carried[stage.name].append(back)
                    if stage.name == earliest.name:
                        break

    def __call__(self, stage: StageReader, version: int) -> Tensor:
        """Sketches of all queries for the rows of a stage, [Q, width]."""
        return sketch_vectors(self._lineage.model, stage, version, self._carried[stage.name])
