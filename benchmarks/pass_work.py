"""The examples and the plain pass that passes for rows are held against, and the turns that they take with it.

Imports torch and transformers only: a peer's own environment runs the same work (``peer_pass.py``).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from overhead_work import BATCH, TOKENS, VOCABULARY
from torch import nn

EXAMPLES = 64  # of one turn
Pass = Callable[[], object]


def tokens() -> list[list[int]]:
    """The examples, EXAMPLES of TOKENS random tokens."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, VOCABULARY, (EXAMPLES, TOKENS), generator=generator).tolist()


def batches() -> list[list[int]]:
    """The examples of each batch."""
    return [list(range(first, first + BATCH)) for first in range(0, EXAMPLES, BATCH)]


def plain(model: nn.Module) -> Pass:
    """Forward and backward over the mean next-token loss of every example, with gradients of all weights."""
    found = torch.tensor(tokens())

    def work() -> None:
        for batch in batches():
            ids = found[batch]
            logits = model(ids).logits[:, :-1]
            losses = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
            losses.unflatten(0, (len(batch), -1)).mean(1).sum().backward()
            model.zero_grad()

    return work


def ratios(turns: Sequence[tuple[Pass, Mapping[str, Pass]]], rounds: int) -> list[dict[str, Any]]:
    """CPU time of every pass over the mean of the plain ones before and after it; medians over the rounds, with their
    standard error. The first round is not counted.

    Args:
        turns: of every round: the plain pass over some examples, and the other passes over the same.
        rounds: that are counted.
    """
    found: dict[str, list[float]] = {}
    for plainly, passes in [*turns] * (rounds + 1):
        before = _cpu(plainly)
        for name, work in passes.items():
            mine, after = _cpu(work), _cpu(plainly)
            found.setdefault("plain again", []).append(after / before)
            found.setdefault(name, []).append(2 * mine / (before + after))
            before = after
    return [{"pass": name, **_summary(taken[len(taken) // (rounds + 1) :])} for name, taken in found.items()]


def _summary(taken: Sequence[float]) -> dict[str, float]:
    error = 1.25 * statistics.stdev(taken) / len(taken) ** 0.5 if len(taken) > 1 else float("nan")
    return {"ratio": statistics.median(taken), "±": error}


def _cpu(work: Pass) -> float:
    """CPU seconds of the process."""
    began = time.process_time()
    work()
    return time.process_time() - began
