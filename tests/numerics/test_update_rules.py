"""Rebuilt steps are torch's; tangents are the derivative of the steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trainer_attrib.numerics.update_rules import (
    AdamWSettings,
    AdamWState,
    SGDSettings,
    SGDState,
    adamw_step,
    adamw_tangent,
    sgd_step,
    sgd_tangent,
)

SGD = {
    "plain": SGDSettings(learning_rate=0.1, weight_decay=0.05),
    "momentum": SGDSettings(learning_rate=0.1, momentum=0.9, weight_decay=0.05),
    "dampened": SGDSettings(learning_rate=0.1, momentum=0.8, dampening=0.3),
    "nesterov": SGDSettings(learning_rate=0.1, momentum=0.9, nesterov=True, weight_decay=0.05),
}
ADAMW = {
    "default": AdamWSettings(learning_rate=1e-2),
    "decay": AdamWSettings(learning_rate=1e-2, beta1=0.7, beta2=0.95, epsilon=1e-6, weight_decay=0.3),
    "no-decay": AdamWSettings(learning_rate=1e-2, beta1=0.0, weight_decay=0.0),
}
EXACT = {torch.float32: 1e-6, torch.float64: 1e-12}


def _gradients(steps: int = 6) -> list[torch.Tensor]:
    """Of different sizes, one entry always zero."""
    mask = torch.ones(5, 7)
    mask[2, 3] = 0
    return [torch.randn(5, 7) * mask * 10.0 ** (k % 3 - 1) for k in range(steps)]


def _schedule(step: int) -> float:
    return 1.0 / step


def _torch_steps(optimizer: Callable[[Any], torch.optim.Optimizer], gradients: list[torch.Tensor]) -> Any:
    """The weights before any and after each of torch's own steps, under a schedule."""
    weight = torch.nn.Parameter(torch.randn(5, 7))
    yield weight.detach().clone()
    tuner = optimizer([weight])
    rate = tuner.param_groups[0]["lr"]
    for step, gradient in enumerate(gradients, 1):
        tuner.param_groups[0]["lr"] = rate * _schedule(step)
        weight.grad = gradient.clone()
        tuner.step()
        yield weight.detach().clone()


@pytest.mark.parametrize("name", ADAMW)
@pytest.mark.parametrize("form", ["foreach", "fused"])
def test_adamw_steps_are_torchs(name: str, form: str, dtype: torch.dtype) -> None:
    s, gradients = ADAMW[name], _gradients()
    steps = _torch_steps(
        lambda p: torch.optim.AdamW(
            p, lr=s.learning_rate, betas=(s.beta1, s.beta2), eps=s.epsilon, weight_decay=s.weight_decay, **{form: True}
        ),
        gradients,
    )
    weight = next(steps)
    state = AdamWState(weight, torch.zeros_like(weight), torch.zeros_like(weight))
    for step, (gradient, expected) in enumerate(zip(gradients, steps, strict=True), 1):
        scheduled = AdamWSettings(**{**vars(s), "learning_rate": s.learning_rate * _schedule(step)})
        before, state = state, adamw_step(state, gradient, scheduled, step)
        assert (state.weight - expected).abs().max() < EXACT[dtype]
        assert (before.weight - expected).abs().max() > 1e-4, "the step moved nothing"


@pytest.mark.parametrize("name", SGD)
def test_sgd_steps_are_torchs(name: str, dtype: torch.dtype) -> None:
    s, gradients = SGD[name], _gradients()
    settings = {key: value for key, value in vars(s).items() if key != "learning_rate"}
    steps = _torch_steps(lambda p: torch.optim.SGD(p, lr=s.learning_rate, **settings), gradients)
    weight = next(steps)
    state = SGDState(weight, torch.zeros_like(weight))
    for step, (gradient, expected) in enumerate(zip(gradients, steps, strict=True), 1):
        scheduled = SGDSettings(**{**vars(s), "learning_rate": s.learning_rate * _schedule(step)})
        before, state = state, sgd_step(state, gradient, scheduled, step)
        assert (state.weight - expected).abs().max() < EXACT[dtype] * expected.abs().max()
        assert (before.weight - expected).abs().max() > 1e-4, "the step moved nothing"


def _chain(rule: Callable[..., Any], state: Any, gradients: list[torch.Tensor], settings: Any) -> Any:
    for step, gradient in enumerate(gradients, 1):
        state = rule(state, gradient, settings, step)
    return state


def _shift(values: Any, changes: Any, by: float) -> list[torch.Tensor]:
    return [value + by * change for value, change in zip(values, changes, strict=True)]


def _check_tangent(found: Any, ahead: Any, behind: Any, h: float) -> None:
    for tangent, plus, minus in zip(found, ahead, behind, strict=True):
        difference = (plus - minus) / (2 * h)
        assert float((tangent - difference).norm()) < 1e-5 * max(float(difference.norm()), 1e-12)


@pytest.mark.parametrize("name", ADAMW)
def test_adamw_tangents_are_the_derivative_of_several_steps(name: str, float64: None) -> None:
    """Weights, means and gradients of all steps change at once."""
    s, gradients = ADAMW[name], [torch.randn(5, 7) for _ in range(5)]
    state = AdamWState(torch.randn(5, 7), 0.1 * torch.randn(5, 7), torch.rand(5, 7) + 0.1)
    change = AdamWState(torch.randn(5, 7), torch.randn(5, 7), 0.1 * torch.randn(5, 7))
    changes, h = [torch.randn(5, 7) for _ in gradients], 1e-5
    ahead, behind = (
        _chain(adamw_step, AdamWState(*_shift(state, change, by)), _shift(gradients, changes, by), s) for by in (h, -h)
    )
    found = change
    for step, (gradient, its_change) in enumerate(zip(gradients, changes, strict=True), 1):
        found = adamw_tangent(state, gradient, found, its_change, s, step)
        state = adamw_step(state, gradient, s, step)
    _check_tangent(found, ahead, behind, h)


@pytest.mark.parametrize("name", SGD)
def test_sgd_tangents_are_the_derivative_of_several_steps(name: str, float64: None) -> None:
    s, gradients = SGD[name], [torch.randn(5, 7) for _ in range(5)]
    state, change = (SGDState(torch.randn(5, 7), torch.randn(5, 7)) for _ in range(2))
    changes, h = [torch.randn(5, 7) for _ in gradients], 1e-4
    ahead, behind = (
        _chain(sgd_step, SGDState(*_shift(state, change, by)), _shift(gradients, changes, by), s) for by in (h, -h)
    )
    _check_tangent(_chain(sgd_tangent, change, changes, s), ahead, behind, h)


def test_adamw_tangent_is_finite_where_no_gradient_ever_came() -> None:
    """An unseen token's row: the root of its second moment is 0 and has no derivative."""
    zero = torch.zeros(3)
    state, s = AdamWState(torch.ones(3), zero, zero), AdamWSettings(learning_rate=0.1)
    found = adamw_tangent(state, zero, AdamWState(torch.ones(3), zero, zero), zero, s, 1)
    assert torch.equal(found.square, zero)
    assert torch.allclose(found.weight, torch.full((3,), 1 - 0.1 * 0.01))


@given(by=st.floats(-3, 3), seed=st.integers(0, 99))
def test_tangents_are_linear(by: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)

    def draw() -> torch.Tensor:
        return torch.randn(4, generator=generator, dtype=torch.float64)

    s, state, gradient = ADAMW["decay"], AdamWState(draw(), draw(), draw().square() + 0.1), draw()
    one, other, d_one, d_other = AdamWState(draw(), draw(), draw()), AdamWState(draw(), draw(), draw()), draw(), draw()
    both = AdamWState(*(a + by * b for a, b in zip(one, other, strict=True)))
    found = adamw_tangent(state, gradient, both, d_one + by * d_other, s, 3)
    parts = (adamw_tangent(state, gradient, c, d, s, 3) for c, d in ((one, d_one), (other, d_other)))
    for whole, a, b in zip(found, *parts, strict=True):
        assert torch.allclose(whole, a + by * b, rtol=1e-9, atol=1e-9)
