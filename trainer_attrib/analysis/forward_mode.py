"""Derivatives of losses along one direction of weight space, of all examples at once: no gradient is formed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from trainer_attrib.analysis.behavior import evaluating
from trainer_attrib.analysis.displacement import Displacement, moved
from trainer_attrib.analysis.training_state import random_states_kept
from trainer_attrib.tap.names import parameters_by_name


class Slopes:
    """Derivatives along a direction at a model's present weights, in evaluation mode.

    They are computed along with the values, forwards (forward-mode automatic differentiation), in the memory of a
    forward pass. Where the model or its loss does not know how, as custom autograd functions without ``jvp`` do not,
    they are central differences of two forward passes from then on, and ``exact`` is False.

    Args:
        model: stands at the weights of interest, and is bit-identical after every call.
        direction: parameter name -> change; what is not named stays.
    """

    def __init__(self, model: nn.Module, direction: Displacement) -> None:
        self._model, self._direction, self.exact = model, direction, True

    def __call__(self, measure: Callable[[nn.Module], Tensor]) -> Tensor:
        """Derivative of everything that is measured, in its shape, float64 on the CPU."""
        with quiet(self._model):
            if self.exact:
                try:
                    return self._forwards(measure)
                except (NotImplementedError, RuntimeError):
                    self.exact = False  # what is wrong with the measure itself is raised by the differences too
            return difference(self._model, self._direction, self._step, measure) / (2 * self._step)

    def _forwards(self, measure: Callable[[nn.Module], Tensor]) -> Tensor:
        with forward_ad.dual_level(), _dual(self._model, self._direction):
            primal, tangent = forward_ad.unpack_dual(measure(self._model))
            return (torch.zeros_like(primal) if tangent is None else tangent).double().cpu()

    @property
    def _step(self) -> float:
        """Balances rounding against the third derivative, for weights that are all of a size."""
        places = parameters_by_name(self._model)
        names = [name for name in self._direction if name in places]
        size = 1 + _norm(places[name].detach() for name in names)
        eps = max(torch.finfo(places[name].dtype).eps for name in names)
        return eps ** (1 / 3) * size / max(_norm(self._direction[name] for name in names), 1e-300)


def difference(
    model: nn.Module, direction: Displacement, step: float, measure: Callable[[nn.Module], Tensor]
) -> Tensor:
    """What is measured a step along the direction minus what is measured a step against it, float64 on the CPU."""
    sides = []
    for signed in (step, -step):
        with moved(model, {name: signed * change for name, change in direction.items()}), quiet(model):
            sides.append(measure(model).double().cpu())
    return sides[0] - sides[1]


@contextmanager
def quiet(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, nothing recorded for backward passes, the same random numbers afterwards as before. Attention
    is that of plain products, the one kernel that can be differentiated forwards everywhere."""
    with (
        evaluating(model), torch.no_grad(), random_states_kept(), sdpa_kernel(SDPBackend.MATH),
        torch.compiler.set_stance("force_eager"),
    ):  # fmt: skip
        yield


@contextmanager
def _dual(model: nn.Module, direction: Mapping[str, Tensor]) -> Iterator[None]:
    """Weights that carry their tangents, wherever modules hold them; the modules' own weights afterwards."""
    duals = {}
    for name, parameter in parameters_by_name(model).items():
        if name in direction:
            duals[id(parameter)] = forward_ad.make_dual(parameter.detach(), direction[name].to(parameter))
    places = [
        (module._parameters, key, parameter)
        for module in model.modules()
        for key, parameter in module._parameters.items()
        if id(parameter) in duals
    ]
    try:
        for holder, key, parameter in places:
            holder[key] = duals[id(parameter)]
        yield
    finally:
        for holder, key, parameter in places:
            holder[key] = parameter


def _norm(parts: Iterator[Tensor]) -> float:
    return float(torch.stack([part.double().norm().cpu() for part in parts]).norm())
