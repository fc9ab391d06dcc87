"""An open stage: what all parts of a recording share from its first step to its last."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from trainer_attrib.capture.beside import stored_buffers, stored_moments, stored_state
from trainer_attrib.capture.coverage import Coverage
from trainer_attrib.capture.messages import logger
from trainer_attrib.capture.processes import Processes, is_sharded
from trainer_attrib.capture.shadows.shadows import Shadows
from trainer_attrib.capture.sharded_weights import describe_shards
from trainer_attrib.capture.stage_facts import stage_facts
from trainer_attrib.capture.window import Describe
from trainer_attrib.ledger.following import FollowingJournal
from trainer_attrib.ledger.journal import Beside, StageJournal, Tensors
from trainer_attrib.ledger.links import Described, describe_weights
from trainer_attrib.ledger.reader import Ledger
from trainer_attrib.ledger.resuming import lost_steps
from trainer_attrib.ledger.row_codecs import row_codec
from trainer_attrib.ledger.sharded import ShardFiles
from trainer_attrib.ledger.storage import Storage
from trainer_attrib.ledger.writer import StageWriter
from trainer_attrib.tap.module_tap import ModuleTap
from trainer_attrib.tap.names import parameters_by_name
from trainer_attrib.tap.plan import SketchPlan
from trainer_attrib.tap.projections import Projections
from trainer_attrib.tap.shards import shard_of
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

    def weights(self) -> Tensors:
        """All parameters; where they are sharded, what this process holds of them."""
        weights = {name: parameter.data for name, parameter in self.parameters.items()}
        return {name: shard_of(weight) for name, weight in weights.items()} if self.sharded else weights

    def described(self) -> tuple[Described, Mapping[str, Tensor]]:
        """Shapes and hashes of all parameters, and the parameters or a sample of each. The first process is told; where
        they are sharded, every one must ask."""
        weights = {name: parameter.data for name, parameter in self.parameters.items()}
        if self.sharded:
            return describe_shards(weights)
        return (describe_weights(weights), weights) if self.processes.leads else ({}, {})

    def beside(self) -> Beside:
        """What a snapshot inside the stage or at its end stores beside the weights."""
        if not self._stores:
            return {}
        return {"moments": stored_moments(self.optimizers, self.parameters), "buffers": stored_buffers(self.model)}

    def beside_start(self) -> tuple[Beside, list[str]]:
        """What is stored beside the weights that the stage starts from, and which of it could not be."""
        if not self._stores:
            return {}, []
        state, left_out = stored_state(self.optimizers, self.parameters)
        return {"optimizer": state, "buffers": stored_buffers(self.model)}, left_out

    def tells_of(self, parameter: Tensor) -> bool:
        """Whether this process tells of a parameter and its gradient. Of replicas, which are the same everywhere, one
        process tells; of shards everyone tells its own, and readers add them up."""
        return self.processes.leads or is_sharded(parameter)

    @property
    def _stores(self) -> bool:
        """Replicas hold the same, so that one of them stores it; of shards everyone stores its own."""
        return self.processes.leads or self.sharded


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
    journal = _resumed(recording, shadows, after_step, facts) if after_step else _begun(recording, shadows, facts)
    shadows.open(journal, after_step)
    codec = row_codec(recording.sketch.dtype, recording.plan.row_blocks)
    writer = StageWriter(recording.storage, f"stages/{recording.name}", codec, recording.processes.rank)
    seen, taken = set[str](), Counter[int]()
    if after_step:
        stage = Ledger(recording.storage.url).stage(recording.name)
        seen.update(stage.examples()["example"].to_pylist())
        taken.update(stage.steps()["optimizer"].to_pylist())
        if recording.processes.leads:
            _note_lost(journal, lost_steps(stage, after_step), after_step)
    return OpenStage(recording, journal, writer, seen, taken)


def _begun(recording: Recording, shadows: Shadows, facts: dict[str, Any]) -> StageJournal:
    beside, left_out = recording.beside_start()
    described, weights = recording.described()
    check = functools.partial(shadows.prepare, start=weights)
    facts |= {"optimizer_state_left_out": left_out}

    def begin() -> StageJournal:
        journal = StageJournal.begin(
            recording.storage, recording.name, described, weights, recording.trainable, facts, check
        )
        if not recording.sharded:
            journal.keep_start(weights, beside)
        return journal

    journal = _led(recording, begin)
    if recording.sharded:
        journal.keep_start(recording.weights(), beside)
    return journal


def _resumed(recording: Recording, shadows: Shadows, after_step: int, facts: dict[str, Any]) -> StageJournal:
    def resume() -> StageJournal:
        shadows.prepare_again(recording.name, {name: p.data for name, p in recording.parameters.items()})
        return StageJournal.resume(recording.storage, recording.name, after_step, recording.trainable, facts)

    return _led(recording, resume)


def _led(recording: Recording, make: Callable[[], StageJournal]) -> StageJournal:
    """The journal that process 0 makes, there, and one that follows it everywhere else."""
    made: list[StageJournal] = []

    def work() -> dict[str, Any]:
        made.append(make())
        return {"meta": made[0].meta, "inherited": made[0].inherited}

    told, rank = recording.processes.led(work), recording.processes.rank
    if not made:
        following = FollowingJournal(recording.storage, recording.name, recording.trainable, told["meta"], rank)
        following.inherited = told["inherited"]
        made.append(following)
    if recording.sharded:
        made[0].files = ShardFiles(rank, recording.processes.each)
    return made[0]


def _note_lost(journal: StageJournal, lost: dict[int, int], after_step: int) -> None:
    """Say which steps before the checkpoint are not in the ledger; the stage is never complete then."""
    if not lost:
        return
    told = ", ".join(f"{steps} of rank {rank}" for rank, steps in lost.items())
    reason = (
        f"of the {after_step} steps before the checkpoint some are not in the ledger ({told}): the run that recorded "
        "them died before they were sealed, or its capture had stopped"
    )
    *earlier, attempt = journal.meta["resumed"]
    journal.update(resumed=[*earlier, attempt | {"lost": reason}])
    logger.warning("stage '%s': %s", journal.meta["name"], reason)
