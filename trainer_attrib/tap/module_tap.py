"""Hooks that turn an ordinary forward and backward pass into per-example gradient sketches.

Verified pitfalls that shape this file: a tensor hook is lost when an in-place operation follows a layer whose output is
a view, so the producing node is hooked instead; non-reentrant checkpointing runs forward hooks a second time inside the
backward pass; two forwards may precede one backward, so a closure holds the record it writes to; weights may be tied.
"""

from __future__ import annotations

import copy
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from trainer_attrib.errors import UnsupportedLayerError
from trainer_attrib.numerics.sketching import sketch_examples
from trainer_attrib.tap.layers import LayerRule, Rule, rule_for
from trainer_attrib.tap.names import modules_by_name, parameters_by_name
from trainer_attrib.tap.plan import SketchPlan, WeightPlan
from trainer_attrib.tap.projections import Projections
from trainer_attrib.tap.segments import Segments
from trainer_attrib.types import Layout


class Unwatched:
    """A hook that stays behind: deep copies and pickles of the model carry one that does nothing.

    Training code copies its model for an average of the weights or pickles it whole; neither may fail on what the
    hooks hold, nor may the copy's passes be recorded.
    """

    def __init__(self, hook: Callable[..., None]) -> None:
        self._hook = hook

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        """Call the hook."""
        self._hook(*args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        return Unwatched, (_nothing,)


def _nothing(*args: Any, **kwargs: Any) -> None:
    pass


class Record:
    """The sketches of one forward pass, filled during its backward pass.

    Args:
        rows: of the forward pass.
        layout: which of them form one example.
        plan: the weights of a sketch.
        like: a tensor with the sketches' device and dtype.
        segments: the documents in the rows, for ``Layout.SEGMENTS``.
    """

    def __init__(
        self, rows: int, layout: Layout, plan: SketchPlan, like: Tensor, segments: Segments | None = None
    ) -> None:
        self.rows, self.layout, self.segments = rows, layout, segments
        self.examples = len(segments) if segments is not None else 1 if layout is Layout.ONE else rows // layout.sides
        self._plan, self._like = plan, like
        self._parts: dict[str, Tensor] = {}
        self.forwards: Counter[str] = Counter()
        self.backwards: Counter[str] = Counter()
        self.skipped: dict[str, str] = {}

    def add(self, weight: WeightPlan, left_BSK: Tensor, right_BSK: Tensor) -> None:
        """Add one layer call's contribution, rows folded into examples."""
        if self.layout is Layout.ONE:
            left_BSK, right_BSK = left_BSK.reshape(1, -1, weight.left), right_BSK.reshape(1, -1, weight.right)
        if self.segments is not None:
            sketch_BKK = self.segments.sketch(left_BSK.flatten(0, 1), right_BSK.flatten(0, 1))
        else:
            sketch_BKK = sketch_examples(left_BSK, right_BSK)
        sketch_BK = sketch_BKK.flatten(1)
        if self.layout.sides > 1:
            sketch_BK = sketch_BK.unflatten(0, (self.layout.sides, self.examples)).sum(0)
        known = self._parts.get(weight.name)
        self._parts[weight.name] = sketch_BK if known is None else known + sketch_BK

    def take(self, weights: Sequence[WeightPlan]) -> Record:
        """What was captured of some weights, as a record of its own that forgets the rest; removed from this one."""
        taken = copy.copy(self)
        names, modules = {w.name for w in weights}, {m for w in weights for m in w.modules}
        taken._parts = {name: part for name, part in self._parts.items() if name in names}
        taken.backwards = Counter({name: count for name, count in self.backwards.items() if name in modules})
        self._parts = {name: part for name, part in self._parts.items() if name not in names}
        self.backwards = Counter({name: count for name, count in self.backwards.items() if name not in modules})
        return taken

    def why_not(self, rule: Rule, x: Tensor, output: Tensor) -> str:
        """Why a layer call cannot be told apart by example, or ``""``."""
        if self.layout is Layout.ONE:
            return ""
        if self.segments is not None:
            by_token = isinstance(rule, LayerRule) and rule.channels == -1
            if by_token and output.shape[:-1].numel() == self.segments.tokens:
                return ""
            return "it does not act token by token, and a row holds several documents"
        if output.shape[0] != self.rows:
            return f"output {tuple(output.shape)} does not start with the batch ({self.rows})"
        if self.rows > 1 and _counts_positions(x):
            return "its input counts positions, the same for every example"
        return ""

    @property
    def sketches(self) -> Tensor:
        """[examples, width]; zeros for weights that nothing reached. Put together at each access."""
        return torch.cat([self._part(weight) for weight in self._plan.weights], dim=1)

    def _part(self, weight: WeightPlan) -> Tensor:
        part = self._parts.get(weight.name)
        return self._like.new_zeros(self.examples, weight.size) if part is None else part


@dataclass(frozen=True)
class _Site:
    """One hooked module."""

    name: str
    module: nn.Module
    rule: Rule
    weight: WeightPlan
    has_bias: bool  # False for a tied module whose own bias is another parameter, or none


class ModuleTap:
    """Forward hooks on every module of a plan. Captures into ``record`` while one is set, otherwise does nothing.

    Args:
        model: the live model.
        plan: weights to sketch.
        projections: may be replaced between optimizer steps (:attr:`projections`).
        on_fault: called with any exception raised inside a hook; training never sees it unless this raises.
    """

    def __init__(
        self,
        model: nn.Module,
        plan: SketchPlan,
        projections: Projections,
        on_fault: Callable[[Exception], None],
    ) -> None:
        self.plan, self.projections, self._on_fault = plan, projections, on_fault
        self.record: Record | None = None
        self.seconds = 0.0  # spent inside the hooks
        self._overlapping = False  # a forward pass began before the one before it was backpropagated
        self._sites = _sites(model, plan)
        self._handles: list[RemovableHandle] = []

    @property
    def modules(self) -> tuple[str, ...]:
        """Names of the modules that are expected to fire."""
        return tuple(site.name for site in self._sites)

    def open(self, rows: int, layout: Layout, segments: Segments | None = None) -> Record:
        """Start a new record for a forward pass over ``rows`` rows and make it current."""
        like = self.projections[self.plan.weights[0].name].left
        self._overlapping = self.record is not None and not self.record.backwards
        self.record = Record(rows, layout, self.plan, like, segments)
        return self.record

    def attach(self) -> ModuleTap:
        """Register the hooks."""
        for site in self._sites:
            hook = Unwatched(self._forward_hook(site))
            self._handles.append(site.module.register_forward_hook(hook, with_kwargs=True))
        return self

    def detach(self) -> None:
        """Remove every hook; safe to call twice."""
        while self._handles:
            self._handles.pop().remove()
        self.record = None

    def _forward_hook(self, site: _Site) -> Callable[..., None]:
        def after_forward(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            record = self.record
            if record is None or not torch.is_grad_enabled() or not _differentiable(output, site):
                return
            recomputed = torch._C._current_graph_task_id() != -1  # inside a backward pass: a checkpoint runs again
            if recomputed and record.forwards[site.name]:
                return  # the graph of the first forward already carries our hook
            began = time.perf_counter()
            try:
                self._watch(site, record, _first_tensor(args, kwargs), output, recomputed)
            except Exception as fault:
                self._on_fault(fault)
            self.seconds += time.perf_counter() - began

        return after_forward

    def _watch(self, site: _Site, record: Record, x: Tensor, output: Tensor, recomputed: bool) -> None:
        """Project the input now (holding it would defeat checkpointing) and hook the output's gradient."""
        if why := record.why_not(site.rule, x, output):
            record.skipped[site.name] = why
            return
        if recomputed and self._overlapping:
            record.skipped[site.name] = "reentrant checkpointing, with several forward passes before one backward pass"
            return
        pair = self.projections[site.weight.name]
        with torch.no_grad(), _full_precision(x.device.type):
            factors_of = site.rule.watch(site.module, x.detach(), pair, pair.bias if site.has_bias else None)
        record.forwards[site.name] += not recomputed

        def after_backward(gradient: Tensor | None) -> None:
            if gradient is None:
                return
            began = time.perf_counter()
            try:
                with torch.no_grad(), _full_precision(gradient.device.type):
                    record.add(site.weight, *factors_of(gradient))
                record.backwards[site.name] += 1
            except Exception as fault:
                self._on_fault(fault)
            self.seconds += time.perf_counter() - began

        _hook_gradient(output, after_backward)


def _sites(model: nn.Module, plan: SketchPlan) -> list[_Site]:
    sites = []
    parameters, modules = parameters_by_name(model), modules_by_name(model)
    for weight in plan.weights:
        for name in weight.modules:
            module = modules[name]
            rule = rule_for(module)
            if rule is None:
                raise UnsupportedLayerError(
                    f"'{name}' is a {type(module).__name__}, not a known layer type here, yet its weight was recorded.",
                    fix="register the layer type as the training script did (docs/extending.md).",
                )
            has_bias = bool(weight.bias) and getattr(module, "bias", None) is parameters[weight.bias]
            sites.append(_Site(name, module, rule, weight, has_bias))
    return sites


def _full_precision(device: str) -> AbstractContextManager[object]:
    """Outside autocast; entering its context costs as much as a small product, so only where one is active."""
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def _differentiable(output: Any, site: _Site) -> bool:
    weight = site.module.weight
    return isinstance(output, Tensor) and output.requires_grad and isinstance(weight, Tensor) and weight.requires_grad


def _first_tensor(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    return next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))


def _counts_positions(x: Tensor) -> bool:
    """Whether these are the indices 0, 1, 2, ...: positions, which as many examples would make look like a batch.

    Looking at the values waits for the device, so only inputs that cannot be told apart by their shape are looked at.
    """
    return x.dim() == 1 and not x.is_floating_point() and bool((x == torch.arange(len(x), device=x.device)).all())


def _hook_gradient(output: Tensor, hook: Callable[[Tensor | None], None]) -> None:
    """Call ``hook`` with the gradient of ``output``, also where an in-place operation replaces the view it is."""
    node = output.grad_fn
    if output._is_view() and node is not None and node.next_functions and node.next_functions[0][0] is not None:
        shape = output.shape

        def before_producer(gradients: tuple[Tensor | None, ...]) -> None:
            hook(None if gradients[0] is None else gradients[0].reshape(shape))

        node.next_functions[0][0].register_prehook(before_producer)
    else:
        output.register_hook(hook)
