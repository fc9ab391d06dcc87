"""One table of steps from those that the processes of a training wrote, each about what it saw."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import groupby
from math import sqrt
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from trainer_attrib.numerics.audit import regress


def merge_steps(table: pa.Table, *, sharded: bool) -> pa.Table:
    """The steps of all processes, one row each, in order.

    Counts add up; the loss is the mean over processes, as data-parallel training defines it. Replicas hold the same
    gradient and weights, which process 0 tells; what shards tell of theirs is added up. The audit compares the sum of
    all rows with the gradient.

    Args:
        table: rows of the steps table, of all ranks.
        sharded: whether each process tells about its own shard.
    """
    rows = [row | {"turn": turn} for row, turn in _with_turns(table.to_pylist())]
    rows = sorted(rows, key=lambda row: (row["step"], row["turn"], row["rank"]))
    merged = [_merged(list(group), sharded) for _, group in groupby(rows, key=lambda row: (row["step"], row["turn"]))]
    return pa.Table.from_pylist(merged, table.schema)


def _with_turns(rows: list[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], int]]:
    """Each row with how many its process wrote before it of the same step: steps skipped in a row share a number."""
    turns: Counter[tuple[int, int]] = Counter()
    for row in rows:
        key = (row["step"], row["rank"])
        yield row, turns[key]
        turns[key] += 1


def _merged(rows: list[dict[str, Any]], sharded: bool) -> dict[str, Any]:
    first = dict(rows[0])
    for name in ("rows", "micro_batches"):
        first[name] = sum(row[name] for row in rows)
    trained = [row["captured"] for row in rows if row["micro_batches"]]  # else a process had nothing to capture
    first["captured"] = bool(trained) and all(trained)
    losses = [row["loss"] for row in rows if row["loss"] is not None]
    first["loss"] = sum(losses) / len(losses) if losses else None
    told = rows if sharded else rows[:1]
    norms = [row["gradient_norm"] for row in told if row["gradient_norm"] is not None]
    first["gradient_norm"] = sqrt(sum(norm**2 for norm in norms)) if norms else None
    first["projected_weights"] = _sum(told, "projected_weights")
    first["captured_sketch"], first["gradient_sketch"] = _sum(rows, "captured_sketch"), _sum(told, "gradient_sketch")
    if first["captured_sketch"] and first["gradient_sketch"]:
        gradient, captured = (torch.from_numpy(_floats(first[n])) for n in ("gradient_sketch", "captured_sketch"))
        first["audit_scale"], first["audit_residual"] = (float(value) for value in regress(gradient, captured))
    return first


def _sum(rows: list[dict[str, Any]], name: str) -> bytes | None:
    found = [_floats(row[name]) for row in rows if row[name] is not None]
    return np.sum(found, axis=0, dtype=np.float32).tobytes() if found else None


def _floats(data: bytes) -> np.ndarray:
    return np.frombuffer(data, np.float32).copy()
