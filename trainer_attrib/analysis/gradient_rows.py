"""Rows of given losses in any projections: gradients per example, of which none is formed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from trainer_attrib.analysis.behavior import Behavior, evaluating
from trainer_attrib.analysis.examples import Examples
from trainer_attrib.errors import AnalysisError
from trainer_attrib.tap.asking_tap import AskingTap
from trainer_attrib.tap.names import parameters_by_name
from trainer_attrib.tap.projections import Projections
from trainer_attrib.tap.record import Record
from trainer_attrib.types import Layout


class GradientRows:
    """A model in evaluation mode whose backward passes leave rows, while this is open.

    Args:
        model: stands at the weights of interest.
        projections: of the rows.
        record: what is kept of each forward pass.
    """

    def __init__(self, model: nn.Module, projections: Projections, record: type[Record] = Record) -> None:
        self._model = model
        self._weights = [parameters_by_name(model)[weight.name] for weight in projections.plan.weights]
        self._tap = AskingTap(model, projections.plan, projections, _raise, record)

    @contextmanager
    def opened(self) -> Iterator[GradientRows]:
        """Hooks are attached inside the block."""
        # Compiled code gives sketches to `backward` only, and is not worth compiling for this.
        with evaluating(self._model), _alone(self._model, self._weights), torch.compiler.set_stance("force_eager"):
            self._tap.attach()
            try:
                yield self
            finally:
                self._tap.detach()

    def of_losses(self, examples: Examples, positions: Sequence[int]) -> Tensor:
        """Rows of some examples' losses, [N, width]."""
        items = examples.items(positions)
        return self._of(lambda: examples.loss(self._model, items), len(items)).sketches

    def of_curvature(
        self, examples: Examples, positions: Sequence[int], generator: torch.Generator
    ) -> Iterator[Record]:
        """Records whose outer products add up, in expectation, to the curvature of some examples' losses; those of the
        losses themselves where the examples know no better (the empirical Fisher information)."""
        items = examples.items(positions)
        if examples.fisher is None:
            yield self._of(lambda: examples.loss(self._model, items), len(items))
            return
        with torch.enable_grad():
            losses = examples.fisher(self._model, items, generator)
        while True:
            record = self._tap.open(len(items), Layout.ROWS)
            with torch.enable_grad():
                drawn = next(losses, None)
                if drawn is None:
                    return
                self._backward(drawn.sum(), "the examples' loss")
            yield record

    def of_query(self, behavior: Behavior, query: int) -> Tensor:
        """Row of a behavior's gradient for one query, [width]."""
        record = self._tap.open(1, Layout.ONE)
        with torch.enable_grad():
            self._backward(behavior.value_of(self._model, query), f"behavior '{behavior.name}'")
        return record.sketches[0]

    def _of(self, losses: Callable[[], Tensor], count: int) -> Record:
        record = self._tap.open(count, Layout.ROWS)
        with torch.enable_grad():
            self._backward(losses().sum(), "the examples' loss")
        return record

    def _backward(self, value: Tensor, what: str) -> None:
        if not value.requires_grad:
            raise AnalysisError(
                f"There is no gradient of {what}.",
                cause="it detaches, rounds or samples.",
                fix="influence needs a differentiable measure; for stage effects any measure will do.",
            )
        self._tap.backward(value)


@contextmanager
def _alone(model: nn.Module, weights: Sequence[nn.Parameter]) -> Iterator[None]:
    """These weights are all that has gradients, inside the block."""
    before, alone = {parameter: parameter.requires_grad for parameter in model.parameters()}, {*map(id, weights)}
    for parameter in before:
        parameter.requires_grad_(id(parameter) in alone)
    try:
        yield
    finally:
        for parameter, required in before.items():
            parameter.requires_grad_(required)


def _raise(fault: Exception) -> None:
    raise fault
