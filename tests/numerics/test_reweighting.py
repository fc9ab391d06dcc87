"""Least changes of weights: the projection that Dykstra's algorithm finds, bounds met, infeasible ones reported."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from trainer_attrib.numerics.reweighting import Bounds, least_change

INFINITE = float("inf")


def dykstra(C_KN: Tensor, bounds: Bounds, most: float, rounds: int = 20000) -> Tensor:
    """The projection of ones onto the bounds and the box (Boyle & Dykstra 1986), slowly."""
    w_N = torch.ones(C_KN.shape[1], dtype=torch.float64)
    corrections = [torch.zeros_like(w_N) for _ in range(len(C_KN) + 1)]

    def project(number: int, x_N: Tensor) -> Tensor:
        if number == len(C_KN):
            return x_N.clamp(0, most)
        row_N = C_KN[number]
        value = row_N @ x_N
        wanted = value.clamp(bounds.low[number], bounds.high[number])
        return x_N + (wanted - value) / row_N.square().sum() * row_N

    for _ in range(rounds):
        before_N = w_N.clone()
        for number, correction_N in enumerate(corrections):
            moved_N = project(number, w_N + correction_N)
            corrections[number], w_N = w_N + correction_N - moved_N, moved_N
        if (w_N - before_N).abs().max() < 1e-13:
            break
    return w_N


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 4))
def test_it_is_the_projection(seed: int, rows: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    C_KN = torch.randn(rows, 12, generator=generator, dtype=torch.float64)
    inside_N = 2 * torch.rand(12, generator=generator, dtype=torch.float64)  # some weights that meet all bounds
    value_K = C_KN @ inside_N
    free_K = torch.rand(rows, generator=generator) < 0.5
    bounds = Bounds(torch.where(free_K, -INFINITE, value_K), value_K.clone())
    found_N, met = least_change(C_KN, bounds)
    assert met
    assert ((C_KN @ found_N - value_K)[~free_K].abs() < 1e-6).all()
    expected_N = dykstra(C_KN, bounds, 2.0)
    if torch.allclose(C_KN[~free_K] @ expected_N, value_K[~free_K], atol=1e-8):  # Dykstra's own convergence
        assert float((found_N - 1).square().sum()) == pytest.approx(
            float((expected_N - 1).square().sum()), rel=1e-4, abs=1e-6
        )


def test_bounds_that_hold_change_nothing() -> None:
    C_KN = torch.tensor([[1.0, -1.0, 0.5]], dtype=torch.float64)
    found_N, met = least_change(C_KN, Bounds(torch.tensor([-INFINITE]).double(), torch.tensor([1.0]).double()))
    assert met
    assert torch.equal(found_N, torch.ones(3, dtype=torch.float64))


def test_bounds_that_cannot_be_met_are_said() -> None:
    C_KN = torch.tensor([[1.0, 1.0]], dtype=torch.float64)
    found_N, met = least_change(C_KN, Bounds(torch.tensor([5.0]).double(), torch.tensor([INFINITE]).double()))
    assert not met
    assert (found_N > 1.9).all(), "it comes as near as it can"
