"""An open stage: what all parts of a recording share from its first step to its last."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from trainer_attrib.capture.beside import stored_buffers, stored_moments, stored_state
from trainer_attrib.capture.coverage import Coverage
from trainer_attrib.capture.messages import logger
from trainer_attrib.capture.processes import Processes, is_sharded, whole
from trainer_attrib.capture.shadows.shadows import Shadows
from trainer_attrib.capture.stage_facts import stage_facts
from trainer_attrib.capture.window import Describe
from trainer_attrib.ledger.following import FollowingJournal
from trainer_attrib.ledger.journal import Beside, StageJournal
from trainer_attrib.ledger.reader import Ledger
from trainer_attrib.ledger.row_codecs import row_codec
from trainer_attrib.ledger.storage import Storage
from trainer_attrib.ledger.writer import StageWriter
from trainer_attrib.tap.module_tap import ModuleTap
from trainer_attrib.tap.names import parameters_by_name
from trainer_attrib.tap.plan import SketchPlan
from trainer_attrib.tap.projections import Projections
from trainer_attrib.types import SketchConfig


@dataclass
class Recording:
    """What is fixed before a stage is opened."""

    storage: Storage
    name: str
    model: nn.Module
    optimizers: Sequence[Optimizer]
    plan: SketchPlan
    sketch: SketchConfig
    raw: Projections
    tap: ModuleTap
    processes: Processes
    describe: Describe | None
    facts: dict[str, Any]

    def __post_init__(self) -> None:
        self.parameters = parameters_by_name(self.model)
        self.trainable = {name for name, parameter in self.parameters.items() if parameter.requires_grad}
        self.sharded = any(is_sharded(parameter) for parameter in self.parameters.values())

    @property
    def like(self) -> Tensor:
        """A tensor with the device and dtype of the rows."""
        return self.raw[self.plan.weights[0].name].left

    def weights(self) -> dict[str, Tensor]:
        """All parameters' values. Where they are sharded they are put together, for which every process must ask."""
        return {name: whole(parameter.data) for name, parameter in self.parameters.items()}

    def beside(self) -> Beside:
        """What a snapshot inside the stage or at its end stores beside the weights."""
        if not self.processes.leads:
            return {}
        moments = {} if self.sharded else stored_moments(self.optimizers, self.parameters)
        return {"moments": moments, "buffers": stored_buffers(self.model)}

    def beside_start(self) -> tuple[Beside, list[str]]:
        """What is stored beside the weights that the stage starts from, and which of it could not be."""
        if not self.processes.leads:
            return {}, []
        state, left_out = ({}, []) if self.sharded else stored_state(self.optimizers, self.parameters)
        return {"optimizer": state, "buffers": stored_buffers(self.model)}, left_out


@dataclass(frozen=True)
class OpenStage:
    """A stage being recorded: what is fixed, and where it is written to. Made by :func:`open_stage`."""

    recording: Recording
    journal: StageJournal
    writer: StageWriter
    seen: set[str]  # examples that are described already
    taken: Counter[int]  # steps before the stage was resumed, by optimizer
    reports: dict[int, Coverage] = field(default_factory=dict)  # by optimizer


def open_stage(recording: Recording, shadows: Shadows, after_step: int) -> OpenStage:
    """Begin the stage, or go on with one that broke off; one process does, the others follow.

    Raises:
        LedgerError: the stage cannot be begun, or not be gone on with.
        ConfigurationError: a shadow cannot be trained along.
    """
    facts = stage_facts(recording.model, recording.optimizers, recording.plan, recording.sketch, recording.trainable)
    facts |= {"processes": recording.processes.size, "sharded": recording.sharded} | recording.facts
    weights = {} if after_step else recording.weights()
    beside, left_out = ({}, []) if after_step else recording.beside_start()
    facts["optimizer_state_left_out"] = left_out
    made: list[StageJournal] = []

    def begin() -> dict[str, Any]:
        storage, name, trainable = recording.storage, recording.name, recording.trainable
        if after_step:
            shadows.prepare_again(name, recording.weights())
            made.append(StageJournal.resume(storage, name, after_step, trainable, facts))
        else:
            check = functools.partial(shadows.prepare, start=weights)
            made.append(StageJournal.begin(storage, name, weights, trainable, facts, beside, check))
        shadows.open(made[0], after_step)
        return made[0].meta

    meta = recording.processes.led(begin)
    journal = made[0] if made else FollowingJournal(recording.storage, recording.name, recording.trainable, meta)
    codec = row_codec(recording.sketch.dtype, recording.plan.row_blocks)
    writer = StageWriter(recording.storage, f"stages/{recording.name}", codec, recording.processes.rank)
    seen, taken = set[str](), Counter[int]()
    if after_step:
        stage = Ledger(recording.storage.url).stage(recording.name)
        seen.update(stage.examples()["example"].to_pylist())
        taken.update(stage.steps()["optimizer"].to_pylist())
        _check_whole(recording.name, after_step, taken.total())
    return OpenStage(recording, journal, writer, seen, taken)


def _check_whole(stage: str, after_step: int, found: int) -> None:
    if found < after_step:
        logger.warning(
            "stage '%s': %d of the %d steps before the checkpoint are not in the ledger; the run that recorded them "
            "died before they were sealed, or its capture had stopped", stage, after_step - found, after_step,
        )  # fmt: skip
