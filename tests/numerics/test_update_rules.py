"""Rebuilt steps are torch's; tangents are the derivative of the steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
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
    carried_into_merged,
    merged_adamw,
    merged_sgd,
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


RATES = [0.1, 0.05, 0.2]


def _coast(state: Any, gradient: torch.Tensor, settings: Any, steps: int, first: int = 1) -> Any:
    """The state after steps with one gradient."""
    take = adamw_step if isinstance(state, AdamWState) else sgd_step
    for step in range(first, first + steps):
        state = take(state, gradient, settings, step)
    return state


def test_merged_adamw_moves_as_far_along_a_constant_gradient(float64: None) -> None:
    """It moves by the learning rate whatever the gradient's size, once its moments agree with the gradient."""
    settings, gradient = AdamWSettings(learning_rate=0.0, weight_decay=0.0, epsilon=0.0), torch.randn(4, 3)
    state = AdamWState(torch.zeros(4, 3), torch.zeros(4, 3), torch.zeros(4, 3))
    apart = state
    for step, rate in enumerate(RATES, 1):
        apart = adamw_step(apart, gradient, replace(settings, learning_rate=rate), step)
    together = adamw_step(state, gradient, merged_adamw(RATES, settings), 1)
    torch.testing.assert_close(together.weight, apart.weight)
    torch.testing.assert_close(together.mean, apart.mean)
    torch.testing.assert_close(together.square, apart.square)


@pytest.mark.parametrize("nesterov", [False, True])
def test_merged_sgd_moves_as_fast_along_a_constant_gradient(nesterov: bool, float64: None) -> None:
    """After many steps, when the momentum is the gradient over 1 - momentum."""
    settings = SGDSettings(learning_rate=0.1, momentum=0.8, nesterov=nesterov)
    gradient, state = torch.randn(4, 3), SGDState(torch.zeros(4, 3), torch.zeros(4, 3))
    merged = merged_sgd([0.1] * 3, settings)
    assert merged.momentum == pytest.approx(0.8**3)
    apart, together = _coast(state, gradient, settings, 300), _coast(state, gradient, merged, 100)
    speeds = [
        _coast(s, gradient, one, n, 400).weight - s.weight
        for s, one, n in ((apart, settings, 3), (together, merged, 1))
    ]
    torch.testing.assert_close(*speeds)


def test_a_carried_momentum_carries_as_far_through_merged_steps(float64: None) -> None:
    still, momentum = torch.zeros(4, 3), torch.randn(4, 3)
    settings = SGDSettings(learning_rate=0.1, momentum=0.8)
    scaled = momentum * carried_into_merged(3, 0.8, averaged=False)
    apart = _coast(SGDState(still, momentum), still, settings, 300, 2)
    together = _coast(SGDState(still, scaled), still, merged_sgd([0.1] * 3, settings), 100, 2)
    torch.testing.assert_close(together.weight, apart.weight)
    assert together.weight.abs().max() > 0.1


def test_a_carried_mean_carries_as_far_through_merged_steps(float64: None) -> None:
    """Late in training, where moments are no longer corrected for their start, and the square hardly changes."""
    still, mean, square = torch.zeros(4, 3), torch.randn(4, 3), torch.ones(4, 3)
    settings = AdamWSettings(learning_rate=0.1, beta1=0.8, beta2=1 - 1e-12, weight_decay=0.0)
    late = 10**14
    scaled = mean * carried_into_merged(3, 0.8, averaged=True)
    apart = _coast(AdamWState(still, mean, square), still, settings, 300, late)
    together = _coast(AdamWState(still, scaled, square), still, merged_adamw([0.1] * 3, settings), 100, late)
    torch.testing.assert_close(together.weight, apart.weight, rtol=1e-6, atol=1e-9)
    assert together.weight.abs().max() > 0.1


def test_one_step_merged_with_none_is_itself() -> None:
    for settings in ADAMW.values():
        assert merged_adamw([0.3], settings) == replace(settings, learning_rate=0.3)
    for settings in SGD.values():
        if not settings.dampening:
            merged = merged_sgd([0.3], settings)
            assert merged.learning_rate == pytest.approx(0.3)
            assert merged.momentum == settings.momentum
    assert carried_into_merged(1, 0.9, averaged=True) == 1
    with pytest.raises(ValueError, match="dampening"):
        merged_sgd([0.1, 0.1], SGD["dampened"])
