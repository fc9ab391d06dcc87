"""Creating a stage and keeping its ``stage.json`` true while it is recorded."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from trainer_attrib.errors import ModelMismatchError
from trainer_attrib.ledger.claims import Claim, claim_new, stage_exists
from trainer_attrib.ledger.links import Described, Link, combined, describe_merged, find_link, inherited
from trainer_attrib.ledger.reader import Ledger, StageReader
from trainer_attrib.ledger.schema import (
    FORMAT,
    NEWEST,
    WEIGHTS,
    beside_name,
    check_format,
    check_stage_name,
    shadow_name,
    shadow_state_name,
    snapshot_name,
    version_name,
)
from trainer_attrib.ledger.snapshots import Files, save_tensors
from trainer_attrib.ledger.storage import Storage
from trainer_attrib.ledger.stored import elsewhere
from trainer_attrib.tap.shards import Shard
from trainer_attrib.types import SketchConfig
from trainer_attrib.version import __version__

KEPT_STATES = 3
"""Checkpoints of which the shadows are kept; resuming from an older one goes on without them."""

Tensors = Mapping[str, Tensor | Shard]
"""Tensors by name, or what this process holds of them."""

Beside = Mapping[str, Tensors]
"""Kind (``moments``, ``buffers``, ``optimizer``) -> name -> value; an empty kind is not stored."""


class StageJournal:
    """The metadata of one stage being recorded: status, plan, snapshots, second-moment versions.

    Made by :meth:`begin` or :meth:`resume`. ``files`` says how snapshots are stored: by this process alone, or by each
    its part.
    """

    files: Files = Files()

    def __init__(
        self, storage: Storage, name: str, trainable: set[str], meta: dict[str, Any], claim: Claim | None = None
    ) -> None:
        self._storage, self._folder, self._trainable, self.meta = storage, f"stages/{name}", trainable, meta
        self._claim = claim
        self.inherited: dict[str, Any] = {}  # what the first snapshot may point to; told, so that one process looks

    @staticmethod
    def begin(
        storage: Storage,
        name: str,
        start: Described,
        weights: Mapping[str, Tensor],
        trainable: set[str],
        facts: dict[str, Any],
        check: Callable[[Link], None] = lambda link: None,
    ) -> StageJournal:
        """Create the stage, which is there for readers once :meth:`keep_start` has stored what it starts from.

        Args:
            storage: the ledger, created if needed.
            name: of the stage, not recorded yet.
            start: shape and hash of all parameters by canonical name (:func:`ledger.links.describe_weights`).
            weights: the parameters, or a sample of each (:func:`ledger.links.sample`).
            trainable: the names of those that train.
            facts: what else to store (plan, optimizer, versions of the software), JSON-ready.
            check: called with the stage's link to its parent, to refuse it before anything of it is stored.

        Raises:
            StageExistsError: the name is taken.
            ModelMismatchError: the ledger was recorded from another model.
        """
        link = _open_ledger(storage, start, weights, facts.get("adapters", ()))
        if link.parent is not None:
            trained_before = set(StageReader(storage, link.parent).meta["trainable"])
            link = replace(link, frozen=tuple(sorted((trained_before & start.keys()) - trainable)))
        check(link)
        claim = claim_new(storage, name)
        meta: dict[str, Any] = {
            "format": FORMAT,
            "name": name,
            "status": "recording",
            "reason": "",
            "began": Ledger(storage.url).later_than_all(),
            "ended": None,
            "parent": link.parent,
            "link": link.to_dict(),
            "weights": {"start": combined(start), "end": None},
            "snapshots": [],
            "versions": [],
            "resumed": [],
            "processes": 1,
            "sharded": False,
            **facts,
        }
        journal = StageJournal(storage, name, trainable, meta, claim)
        journal._describe({"start": start})
        journal.inherited = inherited(storage, link, trainable)
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
        claim = Claim(storage, f"stages/{Ledger(storage.url).stage(name).name}")
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
        kept = [e for e in stage.meta["snapshots"] if e["step"] <= after_step and e["name"] != "end"]
        attempt = {"after_step": after_step, "parts": stage.part_counts(), "processes": facts.get("processes", 1)}
        journal = StageJournal(storage, name, trainable, stage.meta, claim)
        states = [entry for entry in stage.meta.get("shadow_states", []) if entry["step"] <= after_step]
        journal.update(
            status="recording", reason="", snapshots=kept, shadow_states=states,
            resumed=[*stage.meta["resumed"], attempt],
        )  # fmt: skip
        return journal

    def update(self, **changes: Any) -> None:
        """Change entries of ``stage.json`` and write it."""
        self.meta.update(changes)
        if self._claim is not None and changes.get("status") == "incomplete":
            self._claim.make_room()
        self._storage.write_json(f"{self._folder}/stage.json", self.meta)

    def snapshot(self, name: str, step: int, weights: Tensors, beside: Beside | None = None) -> None:
        """Store the trainable weights, and beside them what else is given."""
        trainable = {key: weights[key] for key in sorted(self._trainable)}
        entry = self.files.save(self._storage, f"{self._folder}/{snapshot_name(name)}", trainable)
        self._add({"name": name, "step": step, **entry}, beside or {})

    def _add(self, entry: dict[str, Any], beside: Beside) -> None:
        """List a snapshot once what is beside it is stored, which is not if it is the same as with the one before."""
        for kind, tensors in beside.items():
            if not tensors:
                continue
            content = self.files.content(tensors)
            known = self._before(kind)
            if known.get("content") == content:
                entry |= {kind: elsewhere(known, known["stored_in"]) | {"content": content}}
            else:
                file = f"{self._folder}/{beside_name(entry['name'], kind)}"
                entry |= {kind: self.files.save(self._storage, file, tensors) | {"content": content}}
        if any("shards" in stored for stored in (entry, *entry.values()) if isinstance(stored, dict)):
            self.meta["format"] = NEWEST
        self.update(snapshots=[*self.meta["snapshots"], entry])

    def _before(self, kind: str) -> dict[str, Any]:
        """Hash and place of what is beside the snapshot before, of this stage or at the end of its parent."""
        snapshots = self.meta["snapshots"]
        stage, before = (self.meta["name"], snapshots[-1]) if snapshots else (self.meta["parent"], self.inherited)
        return {"stored_in": [stage, before["name"]]} | before[kind] if kind in before else {}

    def second_moment(self, step: int, factors: dict[str, tuple[Tensor, Tensor]]) -> int:
        """Store a new version of the factored second moments; returns its number, counted from 1."""
        version = len(self.meta["versions"]) + 1
        flat = {f"{name}.rows": rows for name, (rows, _) in factors.items()}
        flat |= {f"{name}.columns": columns for name, (_, columns) in factors.items()}
        entry = save_tensors(self._storage, f"{self._folder}/{version_name(version)}", flat)
        self.update(versions=[*self.meta["versions"], {"version": version, "after_step": step, **entry}])
        return version

    def keep_shadow(self, of: str, replica: int, parts: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Any]:
        """Store a shadow at the stage's end; returns what its entry says of the files.

        Args:
            of: the stage that it is without.
            replica: its number.
            parts: ``weights``, and ``buffers`` and ``optimizer`` unless they are empty.
        """
        entries = {
            kind: save_tensors(
                self._storage, f"{self._folder}/{shadow_name(of, replica, '' if kind == 'weights' else kind)}",
                dict(tensors),
            )
            for kind, tensors in parts.items()
            if tensors or kind == "weights"
        }  # fmt: skip
        return entries.pop("weights") | entries

    def keep_shadow_states(self, step: int, states: Iterable[tuple[dict[str, Any], dict[str, Tensor]]]) -> None:
        """Store shadows for a checkpoint taken after a step; those of the two checkpoints before it are kept too.

        Args:
            step: the last one.
            states: entry (``of``, ``replica`` and counts) and tensors of each shadow.
        """
        known: list[dict[str, Any]] = self.meta.get("shadow_states", [])
        for entry, tensors in states:
            name = shadow_state_name(entry["of"], entry["replica"], step)
            known = [*known, {**entry, "step": step, **save_tensors(self._storage, f"{self._folder}/{name}", tensors)}]
        self._keep_states(known, sorted({entry["step"] for entry in known})[-KEPT_STATES:])

    def _keep_states(self, known: list[dict[str, Any]], steps: Iterable[int]) -> None:
        self.update(shadow_states=[entry for entry in known if entry["step"] in steps])
        for entry in known:
            if entry["step"] not in steps:
                name = shadow_state_name(entry["of"], entry["replica"], entry["step"])
                self._storage.remove(f"{self._folder}/{name}")

    def end(
        self,
        status: str,
        reason: str,
        step: int,
        weights: Tensors | None,
        described: Described | None = None,
        merged: Iterable[tuple[str, Tensor]] = (),
        beside: Beside | None = None,
    ) -> None:
        """Close the stage; a complete one gets its end snapshot and the fingerprints its children are found by.

        Args:
            status: ``"complete"`` or ``"incomplete"``.
            reason: why it is incomplete.
            step: the last one.
            weights: all parameters at the end; None if it was not reached.
            described: their shapes and hashes.
            merged: those that merging the model's adapters would change, with the values this gives.
            beside: what to store beside the weights of the end.
        """
        if weights is not None:
            assert described is not None
            self.snapshot("end", step, weights, beside)
            self._describe({"end": described, "merged": describe_merged(merged)})
            self.meta["weights"]["end"] = combined(described)
            if states := self.meta.get("shadow_states"):
                self._keep_states(states, ())  # nothing goes on with this stage
        self.update(status=status, reason=reason, ended=time.time())
        if self._claim is not None:
            self._claim.release()

    def keep_start(self, weights: Tensors, beside: Beside | None = None) -> None:
        """Store what the stage starts from. The start of a child is the end of its parent, stored once, if the parent
        trained all of its weights too.

        Args:
            weights: all parameters at the start.
            beside: what to store beside them.
        """
        if self.inherited.get("all_weights"):
            place = self.inherited.get("stored_in") or [self.meta["parent"], "end"]
            self._add({"name": "start", "step": 0, **elsewhere(self.inherited, place)}, beside or {})
        else:
            self.snapshot("start", 0, weights, beside)

    def _describe(self, weights: dict[str, Any]) -> None:
        path = f"{self._folder}/{WEIGHTS}"
        known = self._storage.read_json(path) if self._storage.exists(path) else {"format": FORMAT}
        self._storage.write_json(path, known | weights)


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


def _open_ledger(storage: Storage, start: Described, weights: Mapping[str, Tensor], adapters: Iterable[str]) -> Link:
    """Create ``ledger.json``, or check that this model belongs to it; returns the stage that it continues."""
    shapes = {name: entry["shape"] for name, entry in start.items()}
    if storage.create_json("ledger.json", {"format": FORMAT, "created_by": __version__, "parameters": shapes}):
        return Link()
    ledger = Ledger(storage.url)
    link = find_link(ledger.stages(), start, weights, adapters)
    if link.parent is None:
        check_same_model(ledger, start)
    return link


def check_same_model(ledger: Ledger, described: Described) -> None:
    """Weights that continue no stage belong to a ledger if they share names, and no shared one changed its shape.

    Raises:
        ModelMismatchError: otherwise.
    """
    recorded: dict[str, list[int]] = ledger.meta["parameters"]
    shapes = {name: entry["shape"] for name, entry in described.items()}
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
