"""Rows by backward passes that form no weight's gradient."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from trainer_attrib.tap.module_tap import ModuleTap
from trainer_attrib.tap.record import Record
from trainer_attrib.tap.sites import Site, full_precision


@dataclass
class _Front:
    """The output of a layer whose input has no gradient, as it was before anything changed it in place."""

    edge: GradientEdge
    shape: torch.Size
    add: Callable[[Tensor], None] | None = None


class AskingTap(ModuleTap):
    """A tap whose backward passes are asked for the outputs' gradients of the first layers only.

    Everything between these and the value is backpropagated then, and no weight's gradient is formed on the way: a
    third of the work of an ordinary backward pass. Weights that are not in the plan must be frozen, so that an input
    with a gradient has it from a layer that is watched; weights of the plan that a layer outside it uses as well (an
    embedding tied to a watched head) are frozen while that layer runs.
    """

    _fronts: list[_Front]
    _front: _Front | None = None

    def backward(self, value: Tensor) -> None:
        """Fill the current record with the gradient of a value, 0-dim."""
        record, fronts = self.record, self._fronts
        stacks = [getattr(experts.module, key) for experts in self._experts for key in experts.stacks]
        asked = [*(front.edge for front in fronts), *(stack for stack in stacks if stack.requires_grad)]
        gradients = torch.autograd.grad(value, asked, allow_unused=True)
        for front, gradient in zip(fronts, gradients, strict=False):
            if front.add is not None and gradient is not None and record is not None:
                record.reached = True
                with torch.no_grad(), full_precision(gradient.device.type):
                    front.add(gradient.reshape(front.shape))

    def attach(self) -> AskingTap:
        """See :meth:`ModuleTap.attach`."""
        super().attach()
        watched = {id(site.module) for site in self._sites}
        planned = {id(p) for site in self._sites for p in site.module.parameters(recurse=False)}
        for module in self._model.modules():
            tied = [p for p in module.parameters(recurse=False) if id(p) in planned and p.requires_grad]
            if tied and id(module) not in watched:
                begin, end = (partial(_set_gradients, tied, needed) for needed in (False, True))
                self._handles.append(module.register_forward_pre_hook(begin))
                self._handles.append(module.register_forward_hook(end, always_call=True))  # also if it raises
        return self

    def open(self, *args: object, **kwargs: object) -> Record:
        """See :meth:`ModuleTap.open`."""
        self._fronts = []
        return super().open(*args, **kwargs)  # type: ignore[arg-type]

    def _watch(self, site: Site, record: Record, x: Tensor, output: Tensor, recomputed: bool) -> None:
        self._front = None
        if not x.requires_grad:
            self._front = _Front(_produced(output), output.shape)
            self._fronts.append(self._front)
        super()._watch(site, record, x, output, recomputed)

    def _when_backward(self, output: Tensor, record: Record, add: Callable[[Tensor], None]) -> None:
        if self._front is None:
            super()._when_backward(output, record, add)
        else:
            self._front.add, self._front = add, None


def _set_gradients(weights: Sequence[Tensor], needed: bool, *_: object) -> None:
    for weight in weights:
        weight.requires_grad_(needed)


def _produced(output: Tensor) -> GradientEdge:
    """Where the gradient arrives, also if an in-place operation replaces the view that the output is."""
    node = output.grad_fn
    if output._is_view() and node is not None and node.next_functions:
        producer, number = node.next_functions[0]
        if producer is not None:
            return GradientEdge(producer, number)
    return get_gradient_edge(output)
