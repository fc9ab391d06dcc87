"""Products of a training loss's curvature with vectors, at a model's present weights, from the loss's closure alone.

Curvature is the Gauss-Newton matrix J^T H J of the loss: J is the Jacobian of the model's outputs, H the Hessian of the
loss with respect to them (Schraudolph 2002, "Fast curvature matrix-vector products", section 3). It is positive
semi-definite wherever the loss is convex in the outputs, so that a displacement carried along it never grows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from trainer_attrib.analysis.programs import Loss
from trainer_attrib.analysis.training_state import random_states_kept

Tensors = Sequence[Tensor]
"""One tensor per parameter, in the parameters' shapes."""
SETUP, PRODUCT, DIFFERENCE = 1.3, 1.3, 2.0
"""What the first product of a :class:`Curvature` costs beside the others, and what a product costs, in gradients of its
batch (one thread, a transformer of 4 layers and a perceptron of 3); then a product by differences."""
_Product = Callable[[Tensors], list[Tensor]]


class Curvature:
    """The curvature of a batch's loss at the weights at which the model stands when this is made.

    Products are of the Gauss-Newton matrix where the model returns what the loss is computed from. Where it returns
    nothing of the kind, or the loss is linear in it (a model that returns its loss, a fused loss whose gradient is a
    constant to autograd), they are of the Hessian, as central differences of gradients: what autograd takes for second
    derivatives of a fused loss may be wrong without any sign of it. Differences read the weights anew every time, so
    that the model must then stand where it stood. They are also the way out where autograd refuses (recomputed
    activations, kernels with no second derivative).

    The computation's graph is kept from the first product on; dropout is drawn once.

    ``cost`` says what it has cost so far, in gradients of the batch.

    Args:
        model: that the losses are computed with.
        losses: of the batch's micro-batches; the batch's loss is their sum.
        parameters: the coordinates of the vectors; those without ``requires_grad`` get it for the time being.
        seed: of the random numbers that the losses draw.
    """

    def __init__(self, model: nn.Module, losses: Sequence[Loss], parameters: Sequence[Tensor], seed: int = 0) -> None:
        self._model, self._losses, self._parameters, self._seed = model, losses, parameters, seed
        self._products: list[_Product] = []
        self.cost = 0.0

    def product(self, vector: Tensors) -> list[Tensor]:
        """Curvature times a vector; ``cost`` counts it."""
        if not self._products:
            self._products = self._prepared()
        self.cost += DIFFERENCE if self._products == [self._differences] else PRODUCT
        try:
            with gradients_of(self._parameters):
                parts = [product(vector) for product in self._products]
        except RuntimeError:
            if self._products == [self._differences]:
                raise
            self._products = [self._differences]
            return self.product(vector)
        return [torch.stack(parts_of_one).sum(0) for parts_of_one in zip(*parts, strict=True)]

    def _prepared(self) -> list[_Product]:
        self.cost += SETUP
        try:
            with gradients_of(self._parameters):
                products = [self._gauss_newton(self._model, loss) for loss in self._losses]
        except RuntimeError:
            products = [None]
        known = [product for product in products if product is not None]
        return known if len(known) == len(products) else [self._differences]

    def _gauss_newton(self, model: nn.Module, loss: Loss) -> _Product | None:
        """None where the loss is not computed from what the model returns, or is linear in it."""
        with self._twice_differentiable(), outputs_of(model) as outputs:
            value = loss()
            slopes = _gradients([value], outputs, create_graph=True) if outputs else []
            if not any(slope.requires_grad for slope in slopes):
                return None
            # J v is the derivative of J^T u with respect to u, in whose value nobody is interested
            probes = [torch.zeros_like(output, requires_grad=True) for output in outputs]
            pulled = _gradients(outputs, self._parameters, probes, create_graph=True)

        def product(vector: Tensors) -> list[Tensor]:
            pushed = _gradients(pulled, probes, vector)
            curved = _gradients(slopes, outputs, pushed)
            return _gradients(outputs, self._parameters, curved)

        return product

    def _differences(self, vector: Tensors) -> list[Tensor]:
        """(g(w + h v) - g(w - h v)) / 2h with the step h that balances rounding against the third derivative."""
        length = float(torch.stack([v.double().norm() for v in vector]).norm())
        if length == 0:
            return [torch.zeros_like(p) for p in self._parameters]
        size = 1 + float(torch.stack([p.detach().double().norm() for p in self._parameters]).norm())
        step = torch.finfo(self._parameters[0].dtype).eps ** (1 / 3) * size / length
        kept = [p.detach().clone() for p in self._parameters]
        try:
            sides = [self._gradient_at(kept, vector, sign * step) for sign in (1.0, -1.0)]
        finally:
            self._stand(kept)
        return [(plus - minus) / (2 * step) for plus, minus in zip(*sides, strict=True)]

    def _gradient_at(self, kept: Tensors, vector: Tensors, step: float) -> list[Tensor]:
        self._stand([k + step * v.to(k.dtype) for k, v in zip(kept, vector, strict=True)])
        before = [p.grad for p in self._parameters]
        for parameter in self._parameters:
            parameter.grad = None
        with self._twice_differentiable():
            for loss in self._losses:
                loss().backward()  # and not autograd.grad, which recomputed activations refuse
        found = [torch.zeros_like(p) if p.grad is None else p.grad for p in self._parameters]
        for parameter, gradient in zip(self._parameters, before, strict=True):
            parameter.grad = gradient
        return found

    def _stand(self, values: Tensors) -> None:
        with torch.no_grad():
            for parameter, value in zip(self._parameters, values, strict=True):
                parameter.copy_(value)

    @contextmanager
    def _twice_differentiable(self) -> Iterator[None]:
        """The same random numbers every time, and attention that can be differentiated twice."""
        with random_states_kept(), torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            torch.manual_seed(self._seed)
            yield


@contextmanager
def gradients_of(parameters: Tensors) -> Iterator[None]:
    """Gradients of frozen parameters too, inside the block."""
    frozen = [p for p in parameters if not p.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


@contextmanager
def outputs_of(model: nn.Module) -> Iterator[list[Tensor]]:
    """Collects what the model returns inside the block: its logits, once for every call of an outermost module (which
    is not the model itself where a trainer calls a part of it)."""
    depth, found = [0], list[Tensor]()

    def enter(*_: Any) -> None:
        depth[0] += 1

    def leave(_module: nn.Module, _inputs: Any, output: Any) -> None:
        depth[0] -= 1
        logits = _logits(output)
        if depth[0] == 0 and logits is not None and logits.requires_grad:
            found.append(logits)

    hooks = [module.register_forward_pre_hook(enter) for module in model.modules()]
    hooks += [module.register_forward_hook(leave) for module in model.modules()]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def _logits(output: Any) -> Tensor | None:
    if isinstance(output, Mapping):
        output = output.get("logits")
    elif isinstance(output, list | tuple) and output:
        output = output[0]
    output = getattr(output, "logits", output)
    return output if isinstance(output, Tensor) and output.is_floating_point() else None


def _gradients(of: Tensors, to: Tensors, along: Tensors | None = None, *, create_graph: bool = False) -> list[Tensor]:
    """Vector-Jacobian product; zeros where nothing depends."""
    weights = [None] * len(of) if along is None else [w.to(t.dtype) for t, w in zip(of, along, strict=True)]
    pairs = [(t, w) for t, w in zip(of, weights, strict=True) if t.requires_grad]
    if not pairs:
        return [torch.zeros_like(t) for t in to]
    found = torch.autograd.grad(
        [t for t, _ in pairs], list(to), [w for _, w in pairs], create_graph=create_graph, retain_graph=True,
        allow_unused=True,
    )  # fmt: skip
    return [torch.zeros_like(t) if g is None else g for t, g in zip(to, found, strict=True)]
