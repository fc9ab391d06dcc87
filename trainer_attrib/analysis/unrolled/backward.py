"""The derivative of behaviors carried back through one optimizer step, and what each example of the step did to them.

With z the state before a step (weights, moments), g(z) its gradient, c(g) what clipping makes of it and U the update
rule, the step is z' = U(z, c(g)). From the derivative a' with respect to z' follow

    b = dc/dg^T dU/dc^T a',                 with respect to the step's gradient,
    a = dU/dz^T a' + (d b.g / d weights),   with respect to z,
    b . g_i                                 with respect to the weight of example i, where g is the sum of the g_i.

The last two come from one backward pass through the computation of g (Engstrom et al. 2025, "Optimizing ML training
with metagradient descent", section 2; Maclaurin et al. 2015 for momentum).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.nn.attention import SDPBackend, sdpa_kernel

from trainer_attrib.analysis.curvature import gradients_of
from trainer_attrib.analysis.programs import Loss
from trainer_attrib.analysis.unrolled.trajectory import Gradients, Trajectory, Visit
from trainer_attrib.analysis.unrolled.update import Adjoint, Update
from trainer_attrib.errors import AnalysisError, NotComparableError
from trainer_attrib.numerics.clipping import clipping_of


@dataclass(frozen=True)
class StepScores:
    """What the examples of one micro-batch did.

    Args:
        number: of the step, counted from 0.
        micro_batch: counted from 0.
        scores: derivative of each query with respect to the weight of each row's loss, float64 [Q, rows].
        gradient: derivative with respect to a weight on the whole micro-batch's loss, [Q]: the scores' sum, where all
            of the loss passes through the outputs.
    """

    number: int
    micro_batch: int
    scores: Tensor
    gradient: Tensor


class BackwardSweep:
    """Carries an adjoint from the end of a stage to its start.

    Args:
        trajectory: that was run forward.
        adjoint: at its end.
        rows: of each micro-batch's outputs, by step and micro-batch, both counted from 0.
        at_once: queries that share a backward pass.
    """

    def __init__(
        self, trajectory: Trajectory, adjoint: Adjoint, rows: Mapping[tuple[int, int], int], at_once: int
    ) -> None:
        self._path, self.adjoint, self._sizes, self._at_once = trajectory, adjoint, rows, at_once
        self._update = Update(trajectory.stage, trajectory.optimizer, trajectory.trained)
        self._batched = True
        self.functions: list[str] | None = None
        """Functions of the loss, of the first batch seen, with a backward pass of their own: it can hide what its
        result depends on, which autograd then takes for constant."""

    def run(self) -> Iterator[StepScores]:
        """The scores of all micro-batches, last step first; :attr:`adjoint` is at the stage's start in the end.

        Raises:
            AnalysisError: the loss cannot be differentiated twice.
            NotComparableError: the optimizer's rule or clipping is not known, or examples do not come apart.
        """
        for visit in self._path.backwards():
            yield from self._back(visit)

    def _back(self, visit: Visit) -> Iterator[StepScores]:
        names = list(visit.gradient)
        raw = [visit.gradient[name] for name in names]
        clipped = self._clip(visit)
        before, of_clipped = self._update.adjoint(visit, dict(zip(names, clipped, strict=True)), self.adjoint)
        clipping = clipping_of(raw, clipped)
        if clipping is None:
            raise NotComparableError(
                f"Step {visit.number + 1} of stage '{self._path.stage.name}' clipped its gradient in a way whose "
                "derivative is not known.",
                cause="only clipping to a norm of all gradients together and to a value is.",
                fix="choose another recipe for this stage.",
            )
        of_raw = dict(zip(names, clipping.adjoint(raw, [of_clipped[name] for name in names]), strict=True))
        self.adjoint = before
        self._path.stand(visit)
        for index, loss in enumerate(visit.step.losses):
            yield self._through_loss(visit.number, index, loss, of_raw)

    def _clip(self, visit: Visit) -> list[Tensor]:
        """The step's gradient as the program clips it."""
        for name, parameter in self._path.trained.items():
            gradient = visit.gradient.get(name)
            parameter.grad = None if gradient is None else gradient.clone()
        self._path.steps.clip()
        clipped = [found for name in visit.gradient if (found := self._path.trained[name].grad) is not None]
        self._path.optimizer.zero_grad(set_to_none=True)
        return clipped

    def _through_loss(self, number: int, index: int, loss: Loss, of_gradient: Gradients) -> StepScores:
        """Adds to the adjoint what a micro-batch's gradient tells of the weights."""
        places = {name: self._path.parameters[name] for name in self.adjoint.weights}
        trained = [self._path.trained[name] for name in of_gradient]
        count = self._sizes.get((number, index), 0)
        weights = torch.ones(count, dtype=trained[0].dtype, device=trained[0].device, requires_grad=True)
        try:
            with gradients_of(list(places.values())), _twice_differentiable():
                with self._path.outputs.watched():
                    value = self._path.outputs.weighted(loss, weights) if count else loss()
                first = torch.autograd.grad(value, trained, create_graph=True, allow_unused=True)
                self._search(value, first)
                pairs = [
                    (g, a)
                    for g, a in zip(first, of_gradient.values(), strict=True)
                    if g is not None and g.requires_grad
                ]
                found = self._pulled([g for g, _ in pairs], [a for _, a in pairs], [weights, *places.values()])
        except RuntimeError as error:
            raise _not_twice(self._path.stage.name, error) from error
        scores, *of_weights = found
        for name, change in zip(places, of_weights, strict=True):
            self.adjoint.weights[name] = self.adjoint.weights[name] + change
        whole = sum((g.detach().double() * a.double()).flatten(1).sum(1) for g, a in pairs)
        whole = whole if isinstance(whole, Tensor) else torch.zeros(self.adjoint.queries)
        return StepScores(number, index, scores.double().cpu(), whole.double().cpu())

    def _search(self, loss: Tensor, gradients: Sequence[Tensor | None]) -> None:
        """Look once for what autograd would pass by without a word."""
        if self.functions is not None:
            return
        if any(node.name() == "torch::autograd::Error" for node in _nodes(gradients)):
            raise RuntimeError("a function of its own is marked as differentiable once")
        own = {type(node).__name__ for node in _nodes([loss]) if isinstance(node, BackwardCFunction)}
        self.functions = sorted(name.removesuffix("Backward") for name in own)

    def _pulled(self, of: Sequence[Tensor], along: Sequence[Tensor], to: Sequence[Tensor]) -> list[Tensor]:
        """Vector-Jacobian products for all queries, [Q, ...] each; zeros where nothing depends."""
        queries, parts = self.adjoint.queries, []
        for first in range(0, queries if of else 0, self._at_once):
            chunk = [a[first : first + self._at_once].to(g.dtype) for g, a in zip(of, along, strict=True)]
            parts.append(self._together(of, chunk, to))
        if not parts:
            return [torch.zeros(queries, *t.shape, dtype=t.dtype, device=t.device) for t in to]
        return [torch.cat(part) for part in zip(*parts, strict=True)]

    def _together(self, of: Sequence[Tensor], along: Sequence[Tensor], to: Sequence[Tensor]) -> list[Tensor]:
        """For some queries at once, or one by one where an operation knows no batches of gradients."""
        count = len(along[0])
        if self._batched and count > 1:
            try:
                return _filled(_products(of, along, to, batched=True), to, count)
            except RuntimeError:
                self._batched = False
        singles = [_filled(_products(of, [a[i] for a in along], to, batched=False), to, None) for i in range(count)]
        return [torch.stack(part) for part in zip(*singles, strict=True)]


def _products(of: Sequence[Tensor], along: Sequence[Tensor], to: Sequence[Tensor], *, batched: bool) -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "There is a performance drop", UserWarning)
        return torch.autograd.grad(of, to, along, retain_graph=True, allow_unused=True, is_grads_batched=batched)


def _filled(found: Sequence[Tensor | None], to: Sequence[Tensor], count: int | None) -> list[Tensor]:
    leading = () if count is None else (count,)
    pairs = zip(found, to, strict=True)
    return [torch.zeros(*leading, *t.shape, dtype=t.dtype, device=t.device) if f is None else f for f, t in pairs]


def _nodes(tensors: Sequence[Tensor | None]) -> Iterator[Any]:
    """All that tensors were computed by."""
    waiting, seen = [None if tensor is None else tensor.grad_fn for tensor in tensors], set[Any]()
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            yield node
            seen.add(node)
            waiting += [following for following, _ in node.next_functions]


def _twice_differentiable() -> Any:
    return sdpa_kernel(SDPBackend.MATH)


def _not_twice(stage: str, error: RuntimeError) -> AnalysisError:
    reason = str(error).splitlines()[0]
    return AnalysisError(
        f"The loss of stage '{stage}' cannot be differentiated twice: {reason}",
        cause="recomputed activations and some fused kernels have a first derivative only.",
        fix="let the program make its trainer without gradient checkpointing and fused kernels; or use another recipe.",
    )
