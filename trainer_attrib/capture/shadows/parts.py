"""Parts of a step's batch: which examples they are of, and the batch cut down to them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trainer_attrib.capture.batch import batch_content, tensors_of
from trainer_attrib.errors import CaptureError

_PLAIN = (str, bytes, int, float, bool, np.generic)


@dataclass(frozen=True)
class PartLoss:
    """How the loss of a micro-batch is computed again on a part of it.

    Args:
        batch: the micro-batch, tensors in any nesting of dicts, lists and tuples.
        loss_of: a part of the batch -> its loss (0-dim) as a stand-in for the micro-batch's: as it is backpropagated,
            with what it is divided by counted over the part.
        sides: rows of each tensor that belong to one example, see :class:`types.Layout`.
    """

    batch: Any
    loss_of: Callable[[Any], Tensor]
    sides: int = 1

    @property
    def examples(self) -> int:
        """Number of examples.

        Raises:
            CaptureError: the batch holds no tensor, or no whole number of examples.
        """
        content = batch_content(*tensors_of(self.batch))
        if content is None or content.dim() == 0 or content.shape[0] % self.sides or not content.shape[0]:
            raise CaptureError(
                "A batch cannot be cut into parts: "
                + ("it holds no tensor." if content is None else f"its main tensor has shape {tuple(content.shape)}."),
                fix="give recorder.batch(of=...) the batch with its examples along the first axis.",
            )
        return content.shape[0] // self.sides

    def of(self, positions: Sequence[int]) -> Any:
        """The batch cut down to these examples; containers are copies.

        Raises:
            CaptureError: something in the batch cannot be told apart by example.
        """
        count = self.examples
        return _cut(self.batch, None if len(positions) == count else list(positions), count, self.sides, "the batch")


class Turns:
    """Which examples of each micro-batch the replicas of a shadow take: disjoint ones, ``1 / share`` of those seen.

    A step's first micro-batch gives at least one example to each replica, if it has as many. From step to step each
    replica's move on by as many, so that no place in a batch is preferred.
    """

    def __init__(self, share: int, replicas: int) -> None:
        self._share, self._replicas = share, replicas
        self.begin(0)

    def begin(self, step: int) -> None:
        """A new step begins."""
        self._step, self._seen, self._taken = step, 0, [0] * self._replicas

    def of(self, examples: int) -> list[list[int]]:
        """Positions for each replica, of the step's next micro-batch."""
        self._seen += examples
        needed = -(-self._seen // self._share)
        begin = self._step * max(1, examples // self._share)
        order = [(begin + place) % examples for place in range(examples)]
        found = []
        for replica in range(self._replicas):
            count = max(0, min(needed - self._taken[replica], len(order)))
            found.append(sorted(order[:count]))
            self._taken[replica] += count
            order = order[count:]
        return found


def _cut(value: Any, positions: list[int] | None, examples: int, sides: int, name: str) -> Any:
    if isinstance(value, Mapping):
        cut = copy.copy(value)
        for key in list(value):
            cut[key] = _cut(value[key], positions, examples, sides, f"'{key}'")  # type: ignore[index]
        return cut
    if isinstance(value, Tensor | np.ndarray):
        return value if positions is None else _cut_rows(value, positions, examples, sides, name)
    if isinstance(value, list | tuple):
        if positions is not None and value and all(each is None or isinstance(each, _PLAIN) for each in value):
            return _cut_list(value, positions, examples, sides)
        parts = [_cut(each, positions, examples, sides, f"{name}[{i}]") for i, each in enumerate(value)]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    if positions is None or value is None or isinstance(value, _PLAIN):
        return value
    raise _cannot(name, type(value).__name__)


def _cut_rows(value: Any, positions: list[int], examples: int, sides: int, name: str) -> Any:
    """Rows of a tensor: all sides of the examples, or one row each, or a tensor that all examples share."""
    if value.ndim == 0 or value.shape[0] == 1:
        return value
    if value.shape[0] == examples * sides:
        rows = [side * examples + position for side in range(sides) for position in positions]
    elif value.shape[0] == examples:
        rows = positions
    else:
        raise _cannot(name, f"a tensor of shape {tuple(value.shape)}")
    return value[torch.tensor(rows, device=value.device)] if isinstance(value, Tensor) else value[rows]


def _cut_list(value: Any, positions: list[int], examples: int, sides: int) -> Any:
    if len(value) == examples * sides:
        return type(value)(value[side * examples + position] for side in range(sides) for position in positions)
    return type(value)(value[position] for position in positions) if len(value) == examples else value


def _cannot(name: str, found: str) -> CaptureError:
    return CaptureError(
        f"A batch cannot be cut into parts: {name} is {found}, which says not which row belongs to which example.",
        cause="images, documents or graphs of several examples lie one after the other.",
        fix="accumulate gradients over as many micro-batches as thin * replicas, so that whole ones are taken; or "
        "thin=1.",
    )
