"""A ledger opened for a model: which stages led to it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

from torch import nn

from trainer_attrib.analysis.behavior import Behavior
from trainer_attrib.analysis.effects.lineage import Lineage, chosen_stages
from trainer_attrib.analysis.programs import Program
from trainer_attrib.analysis.timeline import Timeline
from trainer_attrib.execution.choice import runner_of
from trainer_attrib.execution.runner import Runner
from trainer_attrib.ledger.journal import check_same_model
from trainer_attrib.ledger.links import describe_weights, find_link
from trainer_attrib.ledger.reader import Ledger, StageReader, no_stage_ended_with
from trainer_attrib.tap.names import adapter_weights, parameters_by_name


class Opened:
    """A ledger and a model that stands at the end of one of its stages; see :class:`trainer_attrib.Analyzer`."""

    def __init__(self, ledger: str | os.PathLike[str], model: nn.Module, *, runner: str | Runner = "serial") -> None:
        self.ledger, self.model, self.runner = Ledger(ledger), model, runner_of(runner)
        weights = {name: parameter.data for name, parameter in parameters_by_name(model).items()}
        described = describe_weights(weights)
        self.link = find_link(self.ledger.stages(), described, weights, adapter_weights(model))
        if self.link.parent is None:
            check_same_model(self.ledger, described)
            raise no_stage_ended_with(self.ledger, self.link.reason)
        self.lineage: list[StageReader] = self.ledger.ancestry(self.link.parent)
        self._timeline = Timeline(model, self.lineage, self.link)

    def _stage(self, name: str) -> StageReader:
        return chosen_stages(self.lineage, [name])[0]

    def _view(self, behaviors: Sequence[Behavior], programs: Mapping[str, Program] | None = None) -> Lineage:
        return Lineage(self.model, self.lineage, self._timeline, list(behaviors), programs or {}, self.runner)
