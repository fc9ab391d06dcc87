"""Creating a stage and keeping its ``stage.json`` true while it is recorded."""

from __future__ import annotations

import json
import time
from typing import Any

from torch import Tensor

from trainer_attrib.errors import ModelMismatchError, StageExistsError
from trainer_attrib.ledger.reader import Ledger, StageReader
from trainer_attrib.ledger.schema import FORMAT, check_format, check_stage_name, snapshot_name, version_name
from trainer_attrib.ledger.snapshots import combine, fingerprint_tensors, save_tensors
from trainer_attrib.ledger.storage import Storage
from trainer_attrib.types import SketchConfig
from trainer_attrib.version import __version__


class StageJournal:
    """The metadata of one stage being recorded: status, plan, snapshots, second-moment versions.

    Made by :meth:`begin` or :meth:`resume`.
    """

    def __init__(self, storage: Storage, name: str, trainable: set[str], meta: dict[str, Any]) -> None:
        self._storage, self._folder, self._trainable, self.meta = storage, f"stages/{name}", trainable, meta

    @staticmethod
    def begin(
        storage: Storage, name: str, weights: dict[str, Tensor], trainable: set[str], facts: dict[str, Any]
    ) -> StageJournal:
        """Create the stage.

        Args:
            storage: the ledger, created if needed.
            name: of the stage, not recorded yet.
            weights: all parameters by canonical name, with the values the stage starts from.
            trainable: the names of those that train.
            facts: what else to store (plan, optimizer, versions of the software), JSON-ready.

        Raises:
            StageExistsError: the name is taken.
            ModelMismatchError: the ledger was recorded from another model.
        """
        _open_ledger(storage, weights)
        start = combine(fingerprint_tensors(weights))
        parent = _stage_ending_with(storage, start)
        if not storage.create_folder(f"stages/{name}"):
            raise stage_exists(storage, name)
        meta: dict[str, Any] = {
            "format": FORMAT,
            "name": name,
            "status": "recording",
            "reason": "",
            "began": time.time(),
            "ended": None,
            "parent": parent.name if parent else None,
            "weights": {"start": start, "end": None},
            "snapshots": [],
            "versions": [],
            "resumed": [],
            "processes": 1,
            "sharded": False,
            **facts,
        }
        journal = StageJournal(storage, name, trainable, meta)
        journal._keep_start(parent, weights)
        return journal

    @staticmethod
    def resume(
        storage: Storage, name: str, after_step: int, trainable: set[str], facts: dict[str, Any]
    ) -> StageJournal:
        """Go on with a stage that broke off, from a checkpoint taken after ``after_step``.

        Nothing is removed: what was recorded after that step is superseded, and readers leave it out. Plan and sketch
        settings must be those of ``facts``, which :meth:`begin` would store.

        Raises:
            StageNotFoundError: there is no such stage.
            StageExistsError: it ran to its end.
            ModelMismatchError: the model's layers or the sketch's settings are others than when it began.
        """
        stage = Ledger(storage.url).stage(name)
        if stage.meta["status"] == "complete":
            raise stage_exists(storage, name)
        same_sketch = SketchConfig(**stage.meta["sketch"]) == SketchConfig(**facts["sketch"])
        same_plan = stage.meta["plan"] == json.loads(json.dumps(facts["plan"]))
        if not same_sketch or not same_plan or set(stage.meta["trainable"]) != trainable:
            raise ModelMismatchError(
                f"Stage '{name}' began with other layers or sketch settings than it is resumed with.",
                cause="the model, its frozen weights or the SketchConfig were changed between the two runs.",
                fix="resume with the same settings, or record the rest as a stage of its own name.",
            )
        kept = [entry for entry in stage.meta["snapshots"] if entry["step"] <= after_step]
        attempt = {"after_step": after_step, "parts": stage.part_counts()}
        journal = StageJournal(storage, name, trainable, stage.meta)
        journal.update(status="recording", reason="", snapshots=kept, resumed=[*stage.meta["resumed"], attempt])
        return journal

    def update(self, **changes: Any) -> None:
        """Change entries of ``stage.json`` and write it."""
        self.meta.update(changes)
        self._storage.write_json(f"{self._folder}/stage.json", self.meta)

    def snapshot(self, name: str, step: int, weights: dict[str, Tensor]) -> None:
        """Store the trainable weights."""
        trainable = {key: weights[key] for key in sorted(self._trainable)}
        entry = save_tensors(self._storage, f"{self._folder}/{snapshot_name(name)}", trainable)
        self.update(snapshots=[*self.meta["snapshots"], {"name": name, "step": step, **entry}])

    def second_moment(self, step: int, factors: dict[str, tuple[Tensor, Tensor]]) -> int:
        """Store a new version of the factored second moments; returns its number, counted from 1."""
        version = len(self.meta["versions"]) + 1
        flat = {f"{name}.rows": rows for name, (rows, _) in factors.items()}
        flat |= {f"{name}.columns": columns for name, (_, columns) in factors.items()}
        entry = save_tensors(self._storage, f"{self._folder}/{version_name(version)}", flat)
        self.update(versions=[*self.meta["versions"], {"version": version, "after_step": step, **entry}])
        return version

    def end(self, status: str, reason: str, step: int, weights: dict[str, Tensor] | None) -> None:
        """Close the stage; a complete one gets its end snapshot and the hash its children are found by."""
        if weights is not None:
            self.snapshot("end", step, weights)
            self.meta["weights"]["end"] = combine(fingerprint_tensors(weights))
        self.update(status=status, reason=reason, ended=time.time())

    def _keep_start(self, parent: StageReader | None, weights: dict[str, Tensor]) -> None:
        """The start of a child is the end of its parent, stored once, if the parent trained all of its weights too."""
        if parent is not None and self._trainable <= set(parent.meta["trainable"]):
            entry = next(s for s in parent.meta["snapshots"] if s["name"] == "end")
            stored_in = entry.get("stored_in") or [parent.name, "end"]
            self.update(snapshots=[{"name": "start", "step": 0, "stored_in": stored_in}])
        else:
            self.snapshot("start", 0, weights)


def check_place(url: Any, stage: str) -> Storage:
    """Fail before training starts, not during it: the name is valid and free, the place can be written.

    The name of a stage that broke off passes, since training may be resumed; :meth:`StageJournal.begin` refuses it.

    Raises:
        ConfigurationError, StageExistsError, LedgerNotWritableError, LedgerFormatError.
    """
    storage = Storage(url)
    check_stage_name(stage)
    if storage.exists("ledger.json"):
        check_format(storage.read_json("ledger.json"), storage.path("ledger.json"))
    if storage.exists(f"stages/{stage}/stage.json") and StageReader(storage, stage).meta["status"] == "complete":
        raise stage_exists(storage, stage)
    storage.check_writable()
    return storage


def has_stage(url: Any, stage: str) -> bool:
    """Whether a stage of this name was begun there."""
    return Storage(url).exists(f"stages/{stage}/stage.json")


def stage_exists(storage: Storage, name: str) -> StageExistsError:
    """The error for a name that is taken."""
    return StageExistsError(
        f"Stage '{name}' is already recorded in {storage.url}.",
        cause="the training script ran before with the same ledger and stage name.",
        fix="give this run another name; if it broke off, resume it from a checkpoint; or remove "
        f"{storage.path(f'stages/{name}')} if it is not needed.",
    )


def _open_ledger(storage: Storage, weights: dict[str, Tensor]) -> None:
    """Create ``ledger.json`` or check that this model belongs to it."""
    shapes = {name: list(tensor.shape) for name, tensor in sorted(weights.items())}
    if not storage.exists("ledger.json"):
        version = __version__
        storage.write_json("ledger.json", {"format": FORMAT, "created_by": version, "parameters": shapes})
        return
    check_same_model(Ledger(storage.url), shapes)


def check_same_model(ledger: Ledger, shapes: dict[str, list[int]]) -> None:
    """A model belongs to a ledger if they share parameters, and no shared parameter changed its shape.

    Raises:
        ModelMismatchError: otherwise.
    """
    recorded: dict[str, list[int]] = ledger.meta["parameters"]
    shared = recorded.keys() & shapes.keys()
    changed = [f"{n}: recorded {recorded[n]}, now {shapes[n]}" for n in sorted(shared) if recorded[n] != shapes[n]]
    if shared and not changed:
        return
    found = "; ".join(changed[:3]) if changed else f"no parameter name in common ({next(iter(shapes), 'none')} ...)"
    raise ModelMismatchError(
        f"{ledger.storage.url} was recorded from another model: {found}.",
        cause="the ledger's path is shared by two projects, or the model was re-configured.",
        fix="use a new ledger directory for this model, or pass the model that was recorded.",
    )


def _stage_ending_with(storage: Storage, weights: str) -> StageReader | None:
    ended = [s for s in Ledger(storage.url).stages() if s.meta["weights"].get("end") == weights]
    return max(ended, key=lambda stage: stage.meta["began"]) if ended else None
