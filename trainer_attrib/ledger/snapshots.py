"""Weights on disk: snapshots as safetensors, fingerprints that link a stage to its parent."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from safetensors.torch import load, load_file, save_file
from torch import Tensor

from trainer_attrib.ledger.storage import Storage, file_digest


def fingerprint_tensors(tensors: dict[str, Tensor]) -> dict[str, str]:
    """Name -> hash of the exact bytes, dtype and shape of each tensor."""
    return {name: _fingerprint(tensor) for name, tensor in sorted(tensors.items())}


def combine(fingerprints: dict[str, str]) -> str:
    """One hash of all tensors, independent of their order."""
    lines = "\n".join(f"{name}={fingerprints[name]}" for name in sorted(fingerprints))
    return hashlib.blake2b(lines.encode(), digest_size=16).hexdigest()


def save_tensors(storage: Storage, name: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Write tensors atomically as safetensors; returns the file's length and checksum."""
    copies = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
    with storage.replacing(name) as path:
        save_file(copies, path)
        return {"bytes": path.stat().st_size, "blake2b": file_digest(path)}


def load_tensors(storage: Storage, name: str) -> dict[str, Tensor]:
    """Read tensors onto the CPU."""
    return load_file(storage.path(name)) if storage.local else load(storage.read(name))


def _fingerprint(tensor: Tensor) -> str:
    tensor = tensor.detach().cpu().contiguous()
    state = hashlib.blake2b(f"{tensor.dtype}{tuple(tensor.shape)}".encode(), digest_size=16)
    state.update(tensor.reshape(-1).view(torch.uint8).numpy().data if tensor.numel() else b"")
    return state.hexdigest()
