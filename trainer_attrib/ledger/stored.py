"""The tensors of a stage: snapshots of its weights, and what is stored beside them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from trainer_attrib.errors import StageNotFoundError
from trainer_attrib.ledger.schema import (
    beside_name,
    check_format,
    check_stage_name,
    ending_name,
    rank_of,
    shard_name,
    snapshot_name,
    version_name,
)
from trainer_attrib.ledger.shadowed import Shadowed, nested
from trainer_attrib.ledger.sharded import load_sharded
from trainer_attrib.ledger.snapshots import load_tensors
from trainer_attrib.ledger.storage import Storage
from trainer_attrib.ledger.tables import corrupt

BESIDE = ("moments", "buffers", "optimizer")
"""What may be stored beside a snapshot."""


class StageTensors(Shadowed):
    """One stage's ``stage.json`` and the tensors that it lists. All are read onto the CPU."""

    def __init__(self, storage: Storage, name: str) -> None:
        self.name, self._storage, self._folder = name, storage, f"stages/{name}"
        self.meta = storage.read_json(f"{self._folder}/stage.json")
        check_format(self.meta, storage.path(f"{self._folder}/stage.json"))
        if self.meta.get("status") == "recording" and (reason := self._broken_off()):
            self.meta |= {"status": "incomplete", "reason": reason}

    @property
    def storage(self) -> Storage:
        """Where the ledger is."""
        return self._storage

    def snapshot_step(self, name: str) -> int:
        """The optimizer step after which a snapshot was taken.

        Raises:
            StageNotFoundError: no such snapshot.
        """
        return int(self.snapshot_entry(name)["step"])

    def snapshot(self, name: str) -> dict[str, Tensor]:
        """Trainable weights at ``"start"``, ``"end"`` or inside the stage, put together where several processes stored
        a part each.

        Raises:
            StageNotFoundError: no such snapshot, for instance the end of an interrupted stage.
            LedgerNotFoundError, CorruptPartError: a file is missing or cut; of several, it says of which process.
        """
        return self._load(name, self.snapshot_entry(name))

    def moments(self, name: str) -> dict[str, Tensor]:
        """Second moments at a snapshot: what the step before it divided by the root of, bias-corrected, by weight name
        and in the weight's shape, float32 (float64 for float64 weights). A second moment that the optimizer keeps as
        row and column means is multiplied out, and left out where weights are sharded. Empty at the start, and where
        the optimizer keeps none or nothing can be read of it.

        Raises:
            StageNotFoundError: no such snapshot.
        """
        return self._beside(name, "moments")

    def buffers(self, name: str) -> dict[str, Tensor]:
        """What training changes beside the weights, at a snapshot: the model's persistent buffers (running means,
        counts) and the frozen parameters of an ``AveragedModel`` inside it, named as in the bare model
        (:func:`tap.names.buffers_by_name` finds them there). Empty where the model has none.

        Raises:
            StageNotFoundError: no such snapshot.
        """
        return self._beside(name, "buffers")

    def optimizer_state(self) -> dict[int, dict[str, dict[str, Tensor]]]:
        """The state that the optimizers brought along when the stage began: number of the optimizer -> weight -> entry,
        numbers as 0-dim float64. Empty where they were fresh; entries that cannot be stored are named in
        ``optimizer_state_left_out`` of ``stage.json``."""
        if not any(entry["name"] == "start" for entry in self.meta["snapshots"]):
            return {}
        return nested(self._beside("start", "optimizer"))

    def factors(self, version: int) -> dict[str, tuple[Tensor, Tensor]]:
        """Row and column means of the second moments of one version, by weight name; empty for version 0."""
        if version == 0:
            return {}
        flat = load_tensors(self._storage, f"{self._folder}/{version_name(version)}")
        names = sorted({name.rpartition(".")[0] for name in flat})
        if flat.keys() != {f"{name}.{side}" for name in names for side in ("rows", "columns")}:
            raise corrupt(self._storage, f"{self._folder}/{version_name(version)}", "it is not rows and columns")
        return {name: (flat[f"{name}.rows"], flat[f"{name}.columns"]) for name in names}

    def _broken_off(self) -> str:
        """What other processes said of how the recording broke off, where process 0 did not live to say it."""
        said = []
        for rank in range(1, self.meta.get("processes", 1)):
            name = f"{self._folder}/{ending_name(rank)}"
            found = self._storage.read_json(name) if self._storage.exists(name) else {}
            if found.get("attempt") == len(self.meta["resumed"]):
                said.append(f"rank {rank} after step {found['step']}: {found['reason']}")
        return "; ".join(said)

    def snapshot_entry(self, name: str) -> dict[str, Any]:
        """What ``stage.json`` says of a snapshot.

        Raises:
            StageNotFoundError: no such snapshot.
        """
        for entry in self.meta["snapshots"]:
            if entry["name"] == name:
                return entry
        raise StageNotFoundError(
            f"Stage '{self.name}' has no snapshot '{name}', only {[s['name'] for s in self.meta['snapshots']]}.",
            cause=f"the stage's status is '{self.meta['status']}'.",
            fix="use a recorded snapshot, or record the stage again under a new name.",
        )

    def _beside(self, name: str, kind: str) -> dict[str, Tensor]:
        entry = self.snapshot_entry(name).get(kind)
        return {} if entry is None else self._load(name, entry, kind)

    def _load(self, name: str, entry: dict[str, Any], kind: str = "") -> dict[str, Tensor]:
        path = self._path(name, entry, kind)
        if "shards" in entry:
            return load_sharded(self._storage, path, entry["shards"])
        return load_tensors(self._storage, path)

    def _path(self, name: str, entry: dict[str, Any], kind: str = "") -> str:
        """Where a snapshot, or what is beside it, is stored: here, or with another snapshot of the lineage."""
        folder, stored = entry.get("stored_in") or (self.name, name)
        check_stage_name(stored)
        file = beside_name(stored, kind) if kind else snapshot_name(stored)
        return f"stages/{check_stage_name(folder)}/{file}"

    def _tensor_files(self) -> Iterator[tuple[str, str, dict[str, Any]]]:
        """What each file is for people, its path in the ledger, and its entry; of shared ones too."""
        for snapshot in self.meta["snapshots"]:
            name = snapshot["name"]
            yield from _files(f"snapshot {name}", self._path(name, snapshot), snapshot)
            for kind in BESIDE:
                if kind in snapshot:
                    path = self._path(name, snapshot[kind], kind)
                    yield from _files(f"{kind} of snapshot {name}", path, snapshot[kind])
        for version in self.meta["versions"]:
            path = f"{self._folder}/{version_name(version['version'])}"
            yield f"second moments of version {version['version']}", path, version
        yield from self._shadow_files()


def elsewhere(entry: dict[str, Any], place: list[str]) -> dict[str, Any]:
    """An entry for what is stored with another snapshot already: where, and in the files of which processes."""
    return {"stored_in": place} | ({"shards": entry["shards"]} if "shards" in entry else {})


def _files(what: str, path: str, entry: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """The file of an entry, or those of all processes."""
    if "shards" not in entry:
        yield what, path, entry
    for rank, shard in entry.get("shards", {}).items():
        shared = {"stored_in": entry["stored_in"]} if "stored_in" in entry else {}
        yield f"{what}, rank {rank_of(rank)}", shard_name(path, rank_of(rank)), shard | shared
