"""Hashes and samples of weights that no process holds as a whole.

A weight has the same hash whether it is sharded or not, so that a stage finds its parent on any number of processes.
The hash takes a weight's bytes in order, and FSDP2's shards are rows in order: every process hands on its own, piece
by piece, and none of them ever holds more of the others than one piece.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from trainer_attrib.ledger.links import Described, describe_weights, sample, sampled
from trainer_attrib.ledger.snapshots import Fingerprint
from trainer_attrib.tap.shards import rows_of, shard_of

PIECE = 16 << 20
"""Bytes that are handed on at a time."""


def describe_shards(weights: Mapping[str, Tensor]) -> tuple[Described, dict[str, Tensor]]:
    """Shape and hash of each weight, and its sample (:func:`ledger.links.sample`), as if it were in one place.

    All processes call this with the same names. The result is process 0's; the others get nothing.
    """
    leads, described, samples = dist.get_rank() == 0, Described(), dict[str, Tensor]()
    for name in sorted(weights):
        weight = weights[name].detach()
        if shard_of(weight).distributed:
            found, values = _described(weight, leads=leads)
        elif leads:
            found, values = describe_weights({name: weight})[name], sample(weight)
        else:
            continue
        if leads:
            described[name], samples[name] = found, values
    return described, samples


def _described(weight: Tensor, *, leads: bool) -> tuple[dict[str, Any], Tensor]:
    shape, begin = tuple(weight.shape), 0
    fingerprint, chosen = Fingerprint(weight.dtype, shape), sampled(weight.numel())
    values = []
    for piece in _pieces(weight):
        if leads:
            on_cpu = piece.cpu()
            fingerprint.add(on_cpu)
            inside = chosen[(chosen >= begin) & (chosen < begin + len(piece))] - begin
            values.append(on_cpu[inside])
        begin += len(piece)
    return {"shape": list(shape), "hash": fingerprint.hexdigest()}, torch.cat(values) if values else torch.empty(0)


def _pieces(weight: Tensor) -> Iterator[Tensor]:
    """The flat entries of a sharded weight in order, on every process."""
    mesh: Any = getattr(weight, "device_mesh")  # noqa: B009 - a DTensor's, which its type does not say
    local = shard_of(weight).local.contiguous().reshape(-1)
    held_by, width = mesh.mesh.flatten().tolist(), math.prod(weight.shape[1:])
    at_a_time = max(1, PIECE // weight.dtype.itemsize)
    for place, rank in enumerate(held_by):
        first, end = rows_of(weight.shape[0], place, len(held_by))
        for begin in range(0, (end - first) * width, at_a_time):
            length = min(at_a_time, (end - first) * width - begin)
            mine = place == mesh.get_local_rank()
            piece = local[begin : begin + length] if mine else local.new_empty(length)
            piece = piece.to(mesh.device_type)  # shards that are offloaded to the CPU
            dist.broadcast(piece.view(torch.uint8), src=rank, group=mesh.get_group())
            yield piece
