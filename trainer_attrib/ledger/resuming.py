"""Where a training that may have been resumed from a checkpoint goes on in the ledger."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trainer_attrib.errors import ConfigurationError
from trainer_attrib.ledger.reader import Ledger, StageReader
from trainer_attrib.ledger.storage import Storage


def place_to_begin(url: Any, stage: str, noted: Mapping[str, Any], trained: int) -> tuple[str, int]:
    """The stage to record into, and the step after which it goes on (0: it is new).

    Args:
        url: the ledger.
        stage: name that a new stage would get.
        noted: what ``Recorder.checkpoint()`` returned when the checkpoint was taken; empty if there is none.
        trained: steps that the training made before, as its trainer counts them; 0 if it was not resumed.

    Raises:
        ConfigurationError: the checkpoint is not one of the recording that would be gone on with.
    """
    if noted and belongs(url, noted):
        return str(noted["stage"]), int(noted["step"])
    if trained and Storage(url).exists(f"stages/{stage}/stage.json"):
        raise ConfigurationError(
            f"Training resumes after {trained} steps from a checkpoint that is none of recording '{stage}' in {url}.",
            cause=_why_not(noted),
            fix="resume from a checkpoint of that run, or record the rest as a stage of its own name.",
        )
    return stage, 0


def belongs(url: Any, noted: Mapping[str, Any]) -> bool:
    """Whether what a checkpoint notes is a stage of this ledger that can be gone on with, and not another of its name.

    A stage that ran to its end cannot: what follows is a stage of its own, its child.
    """
    if not Storage(url).exists(f"stages/{noted['stage']}/stage.json"):
        return False
    meta = Ledger(url).stage(noted["stage"]).meta
    return meta["began"] == noted["began"] and meta["status"] != "complete"


def lost_steps(stage: StageReader, after_step: int) -> dict[int, int]:
    """How many of the steps up to ``after_step`` each process told nothing of; processes that told of all are left out.

    What a killed process had not sealed is lost, also where the others go on. Where the attempts before the last one
    had different numbers of processes, nothing is known of any of them.

    Args:
        stage: resumed again just now.
        after_step: where it goes on.
    """
    sizes = {attempt.get("processes") for attempt in stage.meta["resumed"][:-1]}
    processes = stage.meta["processes"]
    if sizes - {processes, None}:
        return {}
    told = stage.steps_by_rank()
    lost = {rank: after_step - told.get(rank, 0) for rank in range(processes)}
    return {rank: steps for rank, steps in lost.items() if steps > 0}


def _why_not(noted: Mapping[str, Any]) -> str:
    if noted:
        return f"it was taken in another recording of stage '{noted['stage']}', or that one ran to its end."
    return "it was taken without recording, or after capture had stopped."
