"""Capture in code that ``torch.compile`` traces: a sketch leaves the graph as the gradient of one of its inputs.

Python hooks on tensors would cut the graph at every layer. Instead a layer's output passes through :class:`_Tap`, an
identity with a second input, the *leaf*: a tensor without content whose gradient is, by definition, the sketch. The
graph stays whole, and backends fuse, schedule and recompute the products like any others.

Verified pitfalls that shape this file: what dynamo reaches through a hook is taken for part of the module and compiled
anew for each batch size, so leaves hang on a global object; a view as output would forbid in-place operations after
the layer; values, counters and clocks must not be looked at, so what is to be told is told once, while tracing.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from trainer_attrib.tap.layers import Pair
from trainer_attrib.tap.record import NO_BATCH, Record, sketch_rows
from trainer_attrib.tap.sites import Site, full_precision
from trainer_attrib.types import Layout


class _Open:
    """Attribute KEY: the leaves of the current record of the tap with this key."""


_OPEN = _Open()
_COUNT = count()
_TRACED: WeakValueDictionary[str, TracedModules] = WeakValueDictionary()


class TracedModules:
    """The part of a tap that compiled code knows, by its ``key``.

    Args:
        likes: module name -> an empty tensor like the rows of its sketch, [0, K_l * K_r].
        current: the record being written to.
    """

    def __init__(
        self,
        likes: Callable[[], dict[str, Tensor]],
        current: Callable[[], Record | None],
    ) -> None:
        self.key = f"tap_{next(_COUNT)}"
        self.used = False  # whether any module was traced
        self.skipped: dict[str, str] = {}
        self._likes, self._current = likes, current
        _TRACED[self.key] = self
        for told in (_begin, _skip):  # called while tracing, never by compiled code; marking them imports dynamo
            torch.compiler.assume_constant_result(told)

    def open(self, record: Record) -> None:
        """Give a record the leaves that compiled code will look for."""
        if self.used:
            record.skipped |= self.skipped
            record.leaves = {
                name: like.new_empty(1).expand(record.examples, like.shape[1]).requires_grad_()
                for name, like in self._likes().items()
            }
            setattr(_OPEN, self.key, record.leaves)

    def close(self) -> None:
        """Forget the leaves; safe to call twice."""
        _OPEN.__dict__.pop(self.key, None)

    def begin(self) -> None:
        """A module is being traced: from now on records have leaves."""
        record = self._current()
        if record is not None and not record.leaves:
            self.used = True
            self.open(record)

    def skip(self, name: str, why: str) -> None:
        """A module is left out of the graph."""
        self.skipped[name] = why
        record = self._current()
        if record is not None:
            record.skipped[name] = why


def _begin(key: str) -> bool:
    _TRACED[key].begin()
    return True


def _skip(key: str, name: str, why: str) -> bool:
    _TRACED[key].skip(name, why)
    return True


def skip_traced(key: str, names: tuple[str, ...], why: str) -> None:
    """Leave these modules out of the graph that is being traced."""
    for name in names:
        _skip(key, name, why)


class _Tap(torch.autograd.Function):
    """Output -> the same output; the leaf's gradient is what ``sketch_of`` makes of the output's."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, leaf: Tensor, sketch_of: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.sketch_of = sketch_of
        return output.clone()  # which inductor takes out again

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        return gradients[0], ctx.sketch_of(gradients[0]), None


def watch_traced(key: str, site: Site, pair: Pair, record: Record, x: Tensor, output: Tensor) -> Tensor | None:
    """What a module's output is to be replaced with; None where it cannot be captured.

    The same decisions as for eager modules, except that an input's values cannot be looked at.
    """
    _begin(key)
    leaf = getattr(_OPEN, key)[site.name]
    if why := _why_not(record, leaf, x, output):
        _skip(key, site.name, why)
        return None
    factors_of, layout = site.watch(x, pair), record.layout

    def sketch_of(gradient: Tensor) -> Tensor:
        with torch.no_grad(), full_precision(gradient.device.type):
            return sketch_rows(layout, *factors_of(gradient))

    return _Tap.apply(output, leaf, sketch_of)


def _why_not(record: Record, leaf: Tensor, x: Tensor, output: Tensor) -> str:
    """As a record's, but an input's values cannot be looked at, nor can lengths be what graphs depend on."""
    if record.layout is Layout.ONE:
        return ""
    if record.segments is not None:
        return "rows that hold several documents cannot be taken apart in compiled code yet"
    if output.shape[0] != leaf.shape[0] * record.layout.sides:
        return NO_BATCH
    if output.shape[0] > 1 and x.dim() == 1 and not x.is_floating_point():
        return "its input may count positions, and compiled code cannot look"
    return ""
