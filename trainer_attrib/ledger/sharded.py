"""Snapshots of which every process stores the part that it holds: one file per process, one logical snapshot.

A file says in its metadata which rows of which shape its tensors are, so that any number of processes, also one, can
put them together; ``stage.json`` lists the files with length and checksum once all of them are there.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load
from torch import Tensor

from trainer_attrib.errors import CorruptPartError, LedgerNotFoundError
from trainer_attrib.ledger.schema import rank_of, shard_name
from trainer_attrib.ledger.snapshots import Files, combine, decoding, fingerprint_tensors, save_tensors
from trainer_attrib.ledger.storage import Storage
from trainer_attrib.tap.shards import Shard

_PLACES = "shards"  # the metadata's key: {name: {"start": first row, "shape": of the whole}}

Part = tuple[str, Tensor, int, tuple[int, ...]]
"""Name of a tensor, some of its rows, which one the first of them is, and the shape of the whole."""


class ShardFiles(Files):
    """Stores what this process holds, and agrees with the others on what all of them stored.

    Every process calls the same methods in the same order, with tensors of the same names: :class:`tap.shards.Shard`
    for parts, tensors for what all processes hold, which the first one stores.

    Args:
        rank: of this process.
        each: what every process makes, by rank (:meth:`capture.processes.Processes.each`).
    """

    def __init__(self, rank: int, each: Callable[[Callable[[], Any]], list[Any]]) -> None:
        self._rank, self._each = rank, each

    def content(self, tensors: Mapping[str, Any]) -> str:
        """One hash of all tensors as they are sharded; what is not sharded has the hash of its whole."""
        own = {name: shard.local for name, shard in self._own(tensors).items()}
        told = self._each(lambda: combine(fingerprint_tensors(own)) if own else None)
        found = {f"{rank:04d}": content for rank, content in enumerate(told) if content}
        return found["0000"] if found.keys() == {"0000"} else combine(found)

    def save(self, storage: Storage, name: str, tensors: Mapping[str, Any]) -> dict[str, Any]:
        """Store this process's part; returns the files of all, by rank. A process that holds nothing has no file.

        Raises:
            LedgerError: on every process, if one of them could not store its part.
        """
        own = self._own(tensors)
        places = {key: {"start": shard.start, "shape": list(shard.shape)} for key, shard in own.items()}

        def make() -> dict[str, Any] | None:
            local = {key: shard.local for key, shard in own.items()}
            file = shard_name(name, self._rank)
            return save_tensors(storage, file, local, {_PLACES: json.dumps(places)}) if own else None

        shards = {f"{rank:04d}": entry for rank, entry in enumerate(self._each(make)) if entry}
        return {"bytes": sum(entry["bytes"] for entry in shards.values()), "shards": shards}

    def _own(self, tensors: Mapping[str, Any]) -> dict[str, Shard]:
        shards = {
            name: value if isinstance(value, Shard) else Shard(value, 0, tuple(value.shape))
            for name, value in tensors.items()
        }
        return {
            name: shard
            for name, shard in shards.items()
            if (shard.local.numel() if shard.distributed else self._rank == 0)
        }


def load_sharded(storage: Storage, name: str, shards: Mapping[str, Mapping[str, Any]]) -> dict[str, Tensor]:
    """The whole tensors, on the CPU, from the files of all processes; one file is open at a time.

    Args:
        storage: of the ledger.
        name: of the file that would hold the tensors, were they not sharded.
        shards: by rank, as ``stage.json`` lists them.

    Raises:
        LedgerNotFoundError: a process's file is missing.
        CorruptPartError: a file has another length than was sealed, or the parts do not make whole tensors.
    """
    found: dict[str, _Whole] = {}
    sealed = sum(int(entry["bytes"]) for entry in shards.values())
    for rank in sorted(shards, key=rank_of):
        file = shard_name(name, rank_of(rank))
        _check(storage, file, rank_of(rank), shards[rank]["bytes"])
        for key, rows, start, shape in _parts(storage, file):
            if not (whole := found.setdefault(key, _Whole(rows.dtype, shape, sealed))).takes(rows, start, shape):
                said = f"rank {rank_of(rank)} has {list(rows.shape)} from row {start} of {list(shape)}"
                raise _unfit(storage.path(file), key, f"{said}, the ranks before it have {whole.filled} rows")
    for key, whole in found.items():
        if whole.filled != whole.rows:
            raise _unfit(storage.path(name), key, f"all ranks together have {whole.filled} of {whole.rows} rows")
    return {key: whole.value for key, whole in found.items()}


class _Whole:
    """A tensor that is put together from rows, which come in order."""

    def __init__(self, dtype: torch.dtype, shape: tuple[int, ...], sealed: int) -> None:
        """``sealed``, the bytes of all files, bounds what a shape that somebody made up could allocate."""
        self._shape, self.rows, self.filled = shape, shape[0] if shape else 1, 0
        fits = min(shape, default=0) >= 0 and math.prod(shape) * dtype.itemsize <= sealed
        self.value = torch.empty(shape if fits else 0, dtype=dtype)

    def takes(self, rows: Tensor, start: int, shape: tuple[int, ...]) -> bool:
        """Take in the next rows; False if these are not the next ones."""
        end = start + (len(rows) if rows.dim() else 1)
        same = self._shape == shape == self.value.shape and rows.dtype == self.value.dtype
        if not same or rows.shape[1:] != shape[1:] or start != self.filled or end > self.rows:
            return False
        (self.value[start:end] if shape else self.value).copy_(rows)
        self.filled = end
        return True


def _parts(storage: Storage, file: str) -> Iterator[Part]:
    """The tensors of one file, one after another where it is local."""
    if storage.local:
        with decoding(storage, file), safe_open(storage.path(file), framework="pt") as opened:
            for key, start, shape in _places(opened.metadata()):
                yield key, opened.get_tensor(key), start, shape
    else:
        data = storage.read(file)
        with decoding(storage, file):
            header, tensors = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]), load(data)
            for key, start, shape in _places(header["__metadata__"]):
                yield key, tensors[key], start, shape


def _places(metadata: Mapping[str, str]) -> Iterator[tuple[str, int, tuple[int, ...]]]:
    for key, place in dict(json.loads(metadata[_PLACES])).items():
        yield key, int(place["start"]), tuple(int(length) for length in place["shape"])


def _check(storage: Storage, file: str, rank: int, sealed: int) -> None:
    """A part that is missing or cut must never become a weight."""
    path = storage.path(file)
    if not storage.exists(file):
        raise LedgerNotFoundError(
            f"{path} does not exist: what rank {rank} held of the tensors is missing.",
            cause="the ledger was copied without it, or that process wrote to a disk that only its machine sees.",
            fix=f"copy the file from where rank {rank} ran; the ledger must be in a place that all processes share.",
        )
    if (size := storage.size(file)) != sealed:
        raise CorruptPartError(
            f"{path}, the part of rank {rank}, is corrupt: it has {size} bytes, {sealed} were sealed.",
            cause="the file was truncated or changed after it was sealed.",
            fix="run `trainer-attrib verify` for the whole list, then restore this file.",
        )


def _unfit(path: str, key: str, why: str) -> CorruptPartError:
    return CorruptPartError(
        f"{path}: the parts of '{key}' do not make a whole: {why}.",
        cause="files of different runs were mixed, or stage.json was edited.",
        fix="restore the files of this snapshot from one run; `trainer-attrib verify` tells which ones changed.",
    )
