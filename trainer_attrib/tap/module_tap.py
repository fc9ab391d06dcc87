"""Hooks that turn an ordinary forward and backward pass into per-example gradient sketches.

Verified pitfalls that shape this file: a tensor hook is lost when an in-place operation follows a layer whose output is
a view, so the producing node is hooked instead; non-reentrant checkpointing runs forward hooks a second time inside the
backward pass; two forwards may precede one backward, so a closure holds the record it writes to; weights may be tied.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from trainer_attrib.tap.backward_passes import BackwardPasses
from trainer_attrib.tap.experts import as_stack
from trainer_attrib.tap.hooks import Unwatched
from trainer_attrib.tap.plan import SketchPlan
from trainer_attrib.tap.projections import Projections
from trainer_attrib.tap.record import NO_BATCH, Record
from trainer_attrib.tap.routed import Product, RoutedProducts, Stack
from trainer_attrib.tap.segments import Segments
from trainer_attrib.tap.sites import Experts, Site, experts_of, full_precision, sites_of
from trainer_attrib.tap.traced import TracedModules, skip_traced, watch_traced
from trainer_attrib.types import Layout

_COMPILED = "experts in compiled code are not captured yet"
_OVERLAPPING = "reentrant checkpointing, with several forward passes before one backward pass"


class ModuleTap:
    """Forward hooks on every module of a plan. Captures into ``record`` while one is set, otherwise does nothing.

    Args:
        model: the live model.
        plan: weights to sketch.
        projections: may be replaced between optimizer steps (:attr:`projections`).
        on_fault: called with any exception raised inside a hook; training never sees it unless this raises.
        record: what is kept of each forward pass.
    """

    def __init__(
        self,
        model: nn.Module,
        plan: SketchPlan,
        projections: Projections,
        on_fault: Callable[[Exception], None],
        record: type[Record] = Record,
    ) -> None:
        self.plan, self.projections, self._on_fault, self._record_type = plan, projections, on_fault, record
        self._model = model
        self.record: Record | None = None
        self.loss_scale: Tensor | None = None  # of the backward pass that is running; 0-dim, on the device
        self.passes = BackwardPasses()
        self.seconds = 0.0  # spent inside the hooks
        self._overlapping = False  # a forward pass began before the one before it was backpropagated
        self._sites, self._experts = sites_of(model, plan), experts_of(model, plan)
        self._running: list[RoutedProducts] = []  # innermost last
        self._traced = TracedModules(self._likes, lambda: self.record)
        self._handles: list[RemovableHandle] = []
        self._own_forwards: list[tuple[nn.Module, Callable[..., Any]]] = []

    @property
    def modules(self) -> tuple[str, ...]:
        """Names of the modules that are expected to fire."""
        stacks = (name for experts in self._experts for name, _ in experts.stacks.values())
        return (*(site.name for site in self._sites), *stacks)

    @property
    def traced(self) -> bool:
        """Whether any module was captured inside compiled code."""
        return self._traced.used

    def open(self, rows: int, layout: Layout, segments: Segments | None = None) -> Record:
        """Start a new record for a forward pass over ``rows`` rows and make it current."""
        like = self.projections[self.plan.weights[0].name].left
        self._overlapping = self.record is not None and not (self.record.reached or self.record.backwards)
        self.passes.forward_begins()
        self.record = self._record_type(rows, layout, self.plan, like, segments)
        self._traced.open(self.record)
        return self.record

    def attach(self) -> ModuleTap:
        """Register the hooks."""
        for site in self._sites:
            hook = Unwatched(self._forward_hook(site))
            self._handles.append(site.module.register_forward_hook(hook, with_kwargs=True))
        for experts in self._experts:
            begin, end = Unwatched(self._before_experts(experts)), Unwatched(self._after_experts)
            self._handles.append(experts.module.register_forward_pre_hook(begin, with_kwargs=True))
            self._handles.append(experts.module.register_forward_hook(end, always_call=True))  # also if it raises
        return self

    def detach(self) -> None:
        """Remove every hook; safe to call twice."""
        while self._handles:
            self._handles.pop().remove()
        while self._running:  # a forward pass was broken off
            self._running.pop().leave()
        self._traced.close()
        self.record = None
        for module, forward in self._own_forwards:
            if module.__dict__.get("forward") is forward:
                del module.forward
        self._own_forwards.clear()

    def retrace(self) -> None:
        """Have code that was compiled before the hooks were there compiled again, with them.

        Compiled code does not notice hooks that come later. It does notice when a module gets a ``forward`` of its own,
        here the one of its class; once that is gone, the code from before is valid again.
        """
        for site in self._sites:
            if "forward" not in site.module.__dict__:
                self._own_forwards.append((site.module, site.module.forward))
                site.module.forward = self._own_forwards[-1][1]

    def _likes(self) -> dict[str, Tensor]:
        return {
            site.name: self.projections[site.weight.name].left.new_empty(0, site.weight.size) for site in self._sites
        }

    def _forward_hook(self, site: Site) -> Callable[..., Tensor | None]:
        key = self._traced.key

        def after_forward(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
        ) -> Tensor | None:
            record = self.record
            if record is None or not torch.is_grad_enabled() or not _differentiable(output, module):
                return None
            if torch.compiler.is_compiling():
                pair = self.projections[site.weight.name]
                return watch_traced(key, site, pair, record, _first_tensor(args, kwargs), output)
            recomputed = torch._C._current_graph_task_id() != -1  # inside a backward pass: a checkpoint runs again
            if recomputed and record.forwards[site.name]:
                return None  # the graph of the first forward already carries our hook
            began = time.perf_counter()
            try:
                self._watch(site, record, _first_tensor(args, kwargs), output, recomputed)
            except Exception as fault:
                self._on_fault(fault)
            self.seconds += time.perf_counter() - began
            return None

        return after_forward

    def _watch(self, site: Site, record: Record, x: Tensor, output: Tensor, recomputed: bool) -> None:
        """Project the input now (holding it would defeat checkpointing) and hook the output's gradient."""
        if why := record.why_not(site.rule, x, output):
            record.skipped[site.name] = why
            return
        if recomputed and self._overlapping:
            record.skipped[site.name] = _OVERLAPPING
            return
        factors_of = site.watch(x, self.projections[site.weight.name])
        record.forwards[site.name] += not recomputed
        self._when_backward(output, record, lambda gradient: record.add(site.name, site.weight, *factors_of(gradient)))

    def _when_backward(self, output: Tensor, record: Record, add: Callable[[Tensor], None]) -> None:
        def after_backward(gradient: Tensor | None) -> None:
            if gradient is None:
                return
            began = time.perf_counter()
            try:
                self.passes.reached()
                record.reached, record.loss_scale = True, self.loss_scale
                with torch.no_grad(), full_precision(gradient.device.type):
                    add(gradient)
            except Exception as fault:
                self._on_fault(fault)
            self.seconds += time.perf_counter() - began

        _hook_gradient(output, after_backward)

    def _before_experts(self, experts: Experts) -> Callable[..., None]:
        key, names = self._traced.key, tuple(name for name, _ in experts.stacks.values())

        def before_forward(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            record = self.record
            if record is None or not torch.is_grad_enabled():
                return
            if torch.compiler.is_compiling():
                return skip_traced(key, names, _COMPILED)
            recomputed = torch._C._current_graph_task_id() != -1
            if recomputed and any(record.forwards[name] for name in names):
                return
            began = time.perf_counter()
            try:
                self._watch_experts(experts, record, _first_tensor(args, kwargs), recomputed)
            except Exception as fault:
                self._on_fault(fault)
            self.seconds += time.perf_counter() - began

        return before_forward

    def _after_experts(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self._running and self._running[-1].module is module:
            self._running.pop().leave()

    def _watch_experts(self, experts: Experts, record: Record, tokens: Tensor, recomputed: bool) -> None:
        """Find the products until the module's forward ends; project their inputs, hook their outputs' gradients."""
        weights = dict(experts.stacks.values())
        owner_T = record.owners(tokens.shape[:-1].numel())
        if self.traced or owner_T is None or (recomputed and self._overlapping):
            why = _COMPILED if self.traced else _OVERLAPPING if owner_T is not None else NO_BATCH
            record.skipped |= dict.fromkeys(weights, why)
            return
        stacks = [
            Stack(name, parameter, as_stack(self.projections[weight.name].left, parameter))
            for key, (name, weight) in experts.stacks.items()
            if (parameter := getattr(experts.module, key)).requires_grad
        ]

        def found(product: Product) -> None:
            weight, began = weights[product.stack], time.perf_counter()
            right_KI = self.projections[weight.name].right
            with full_precision(right_KI.device.type):
                right_PK = F.linear(product.x.to(right_KI.dtype), right_KI)

            def add(gradient: Tensor) -> None:
                record.add_routed(product.stack, weight, product.project(gradient), right_PK, product.owner)

            self._when_backward(product.output, record, add)
            record.forwards[product.stack] += not recomputed
            self.seconds += time.perf_counter() - began

        products = RoutedProducts(experts.module, tokens, owner_T, stacks, found, record.skipped, self._on_fault)
        self._running.append(products)
        products.__enter__()


def _differentiable(output: Any, module: nn.Module) -> bool:
    weight = module.weight
    return isinstance(output, Tensor) and output.requires_grad and isinstance(weight, Tensor) and weight.requires_grad


def _first_tensor(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    return next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))


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
