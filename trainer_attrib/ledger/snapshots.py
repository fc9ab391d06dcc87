"""Weights on disk: snapshots as safetensors, fingerprints that link a stage to its parent."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, load_file, save_file
from torch import Tensor

from trainer_attrib.errors import CorruptPartError
from trainer_attrib.ledger.storage import Storage, file_digest


def fingerprint_tensors(tensors: dict[str, Tensor]) -> dict[str, str]:
    """Name -> hash of the exact bytes, dtype and shape of each tensor."""
    return {name: _fingerprint(tensor) for name, tensor in sorted(tensors.items())}


def combine(fingerprints: dict[str, str]) -> str:
    """One hash of all tensors, independent of their order."""
    lines = "\n".join(f"{name}={fingerprints[name]}" for name in sorted(fingerprints))
    return hashlib.blake2b(lines.encode(), digest_size=16).hexdigest()


class Fingerprint:
    """The hash of a tensor whose bytes come in pieces, in order; the same as that of the whole."""

    def __init__(self, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
        self._state = hashlib.blake2b(f"{dtype}{tuple(shape)}".encode(), digest_size=16)

    def add(self, piece: Tensor) -> None:
        """Take in the next entries, contiguous and on the CPU."""
        if piece.numel():
            self._state.update(piece.reshape(-1).view(torch.uint8).numpy().data)

    def hexdigest(self) -> str:
        """The hash."""
        return self._state.hexdigest()


class Files:
    """How a journal stores a set of tensors: one file, in one process. :class:`ledger.sharded.ShardFiles` is the other
    way."""

    def content(self, tensors: Mapping[str, Any]) -> str:
        """One hash of all tensors."""
        return combine(fingerprint_tensors(dict(tensors)))

    def save(self, storage: Storage, name: str, tensors: Mapping[str, Any]) -> dict[str, Any]:
        """Store them; returns what a reader needs to find and check them."""
        return save_tensors(storage, name, dict(tensors))


def save_tensors(
    storage: Storage, name: str, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None
) -> dict[str, Any]:
    """Write tensors atomically as safetensors; returns the file's length and checksum."""
    copies = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
    with storage.replacing(name) as path:
        save_file(copies, path, metadata)
        return {"bytes": path.stat().st_size, "blake2b": file_digest(path)}


def load_tensors(storage: Storage, name: str) -> dict[str, Tensor]:
    """Read tensors onto the CPU.

    Raises:
        LedgerNotFoundError: there is no such file.
        CorruptPartError: it is damaged. Shapes are compared with the file's length before anything is allocated.
    """
    if not storage.exists(name):
        storage.read(name)  # says so
    with decoding(storage, name):
        return load_file(storage.path(name)) if storage.local else load(storage.read(name))


@contextmanager
def decoding(storage: Storage, name: str) -> Iterator[None]:
    """What decoding a damaged file raises, as an error that says which file it is.

    Raises:
        CorruptPartError: instead.
    """
    try:
        yield
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise CorruptPartError(
            f"{storage.path(name)} is corrupt: safetensors says: {error}.",
            cause="the file was truncated or changed after it was sealed.",
            fix="run `trainer-attrib verify` for the whole list, then restore this file; other parts are intact.",
        ) from None


def _fingerprint(tensor: Tensor) -> str:
    fingerprint = Fingerprint(tensor.dtype, tuple(tensor.shape))
    fingerprint.add(tensor.detach().cpu().contiguous())
    return fingerprint.hexdigest()
