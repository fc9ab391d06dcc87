"""A weight on each example's loss, for any program: on the gradient that passes through what the model returned.

A program hands over the loss of a batch, not those of its examples. But the examples' parts come apart where the loss
is computed from the model's outputs, one row for each example: row i of the loss's gradient there, pulled back through
the model, is the gradient of example i's loss. Multiplied by a weight it is that of the weighted loss, whatever the
loss is; nothing else of the computation changes, and no gradient of a single example is ever formed.

Outputs are the last tensors with one row per example that a module returned on the way to the loss: logits, also where
the model computes the loss itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from trainer_attrib.analysis.programs import Loss
from trainer_attrib.errors import NotComparableError


@dataclass
class ExampleOutputs:
    """What the modules of a model return while a loss is computed.

    Args:
        model: that the losses are computed with.
    """

    model: nn.Module
    _found: list[Tensor] | None = field(default=None, init=False)

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Hooks inside the block, none after it."""
        handles = [module.register_forward_hook(self._after) for module in self.model.modules()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def weighted(self, loss: Loss, weights: Tensor) -> Tensor:
        """The loss, whose gradient will be that of the examples' losses times their weights.

        Args:
            loss: of a micro-batch.
            weights: one per row of what the model returns, with a gradient if the derivative is wanted.

        Raises:
            NotComparableError: the loss is not computed from rows that the model returned.
        """
        self._found = []
        try:
            value = loss()
            outputs = _last_before(value, self._found, len(weights))
        finally:
            self._found = None
        if not outputs:
            raise NotComparableError(
                f"A loss was not computed from outputs of {len(weights)} rows, one for each recorded example.",
                cause="the model returns other rows than those that were recorded, or calls no modules.",
                fix="let the model return one row per example along the first axis; or use another recipe.",
            )
        for output in outputs:
            by_row = weights.view(-1, *[1] * (output.dim() - 1))
            output.register_hook(lambda gradient, by_row=by_row: gradient * by_row.to(gradient))
        return value

    def _after(self, module: nn.Module, inputs: Any, output: Any) -> None:
        if self._found is not None:
            self._found += _tensors(output)


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping | list | tuple):
        for value in output.values() if isinstance(output, Mapping) else output:
            yield from _tensors(value)


def _last_before(loss: Tensor, candidates: list[Tensor], rows: int) -> list[Tensor]:
    """Those of the candidates with so many rows that the loss is computed from without another one in between."""
    by_node: dict[Any, list[Tensor]] = {}
    for tensor in candidates:
        if tensor.dim() and tensor.shape[0] == rows and tensor.grad_fn is not None:
            same = by_node.setdefault(tensor.grad_fn, [])
            if all(tensor.output_nr != other.output_nr for other in same):
                same.append(tensor)
    found, waiting, seen = list[Tensor](), [loss.grad_fn], set[Any]()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node in by_node:
            found += by_node[node]
        else:
            waiting += [following for following, _ in node.next_functions]
    return found
