"""Sketches are linear, agree between their two forms, and lose no scale."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer_attrib.numerics.audit import regress
from trainer_attrib.numerics.second_moment import factor, inverse_root, lifted, root_mean
from trainer_attrib.numerics.sketching import add_bias, sketch_examples, sketch_matrix, unit_rows

sizes = st.integers(1, 9)
seeds = st.integers(0, 10_000)


def _random(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(seeds, sizes, sizes, sizes, sizes)
@settings(deadline=None, max_examples=40)
def test_projected_factors_give_the_projected_gradient(seed: int, b: int, s: int, r: int, c: int) -> None:
    """sum_s (P l_s)(Q r_s)^T = P (sum_s l_s r_s^T) Q^T."""
    left, right = _random(seed, b, s, r), _random(seed + 1, b, s, c)
    p, q = _random(seed + 2, 3, r), _random(seed + 3, 2, c)
    whole = torch.einsum("bsr,bsc->brc", left, right)
    assert torch.allclose(sketch_examples(left @ p.T, right @ q.T), torch.einsum("kr,brc,lc->bkl", p, whole, q))


@given(seeds, sizes, sizes, st.floats(-3, 3), st.floats(-3, 3))
@settings(deadline=None, max_examples=40)
def test_sketch_of_a_matrix_is_linear(seed: int, r: int, c: int, x: float, y: float) -> None:
    a, b = _random(seed, r, c), _random(seed + 1, r, c)
    p, q = _random(seed + 2, 3, r), _random(seed + 3, 2, c)
    combined = sketch_matrix(x * a + y * b, p, q)
    assert torch.allclose(combined, x * sketch_matrix(a, p, q) + y * sketch_matrix(b, p, q), atol=1e-9)


@given(seeds, sizes, sizes, st.integers(0, 1))
@settings(deadline=None, max_examples=40)
def test_bias_counts_as_one_more_row_or_column(seed: int, r: int, c: int, axis: int) -> None:
    weight, bias = _random(seed, r, c), _random(seed + 1, c if axis == 0 else r)
    whole = torch.cat([weight, bias.unsqueeze(axis)], dim=axis)
    p, q = _random(seed + 2, 3, whole.shape[0]), _random(seed + 3, 2, whole.shape[1])
    sides = (p[:, :-1], q) if axis == 0 else (p, q[:, :-1])
    last = (p if axis == 0 else q)[:, -1]
    found = add_bias(sketch_matrix(weight, *sides), bias, axis, sides[1 - axis], last)
    assert torch.allclose(found, p @ whole @ q.T)


@given(seeds, sizes, sizes)
@settings(deadline=None, max_examples=40)
def test_unit_rows_keep_direction_and_norm(seed: int, n: int, k: int) -> None:
    rows = _random(seed, n, k) * 10.0 ** _random(seed + 1, n, 1)
    unit, norms = unit_rows(rows)
    assert torch.allclose(unit.norm(dim=1), torch.ones(n, dtype=torch.float64))
    assert torch.allclose(unit * norms[:, None], rows)


def test_unusable_rows_become_zeros_and_say_so_in_their_norm() -> None:
    unit, norms = unit_rows(torch.tensor([[0.0, 0.0], [float("inf"), 1.0], [float("nan"), 1.0], [3.0, 4.0]]))
    assert not unit[:3].any()
    assert norms[0] == 0
    assert not torch.isfinite(norms[1:3]).any()
    assert norms[3] == 5


@given(seeds, st.integers(1, 30), st.floats(1e-6, 1e6), st.booleans())
@settings(deadline=None, max_examples=60)
def test_regression_is_exact_on_exact_multiples(seed: int, k: int, scale: float, negative: bool) -> None:
    scale = -scale if negative else scale
    captured = _random(seed, k)
    found, residual = regress(scale * captured, captured)
    assert abs(float(found) / scale - 1) < 1e-12
    assert float(residual) < 1e-12


@given(seeds, st.integers(2, 30))
@settings(deadline=None, max_examples=40)
def test_regression_residual_is_the_sine_of_the_angle(seed: int, k: int) -> None:
    gradient, captured = _random(seed, k), _random(seed + 1, k)
    _, residual = regress(gradient, captured)
    cosine = torch.nn.functional.cosine_similarity(gradient, captured, dim=0)
    assert abs(float(residual) - float((1 - cosine**2).clamp_min(0).sqrt())) < 1e-7


def test_regression_of_nothing_is_unknown() -> None:
    for gradient, captured in [(torch.zeros(3), torch.ones(3)), (torch.ones(3), torch.zeros(3))]:
        assert all(torch.isnan(value) for value in regress(gradient, captured))


@given(seeds, sizes, sizes)
@settings(deadline=None, max_examples=40)
def test_factors_of_a_rank_one_moment_are_exact(seed: int, r: int, c: int) -> None:
    """V = u v^T gives a b^T = 1/sqrt(V), also where its entries span a few magnitudes."""
    moment = torch.outer(_random(seed, r).exp(), _random(seed + 1, c).exp())
    a, b = inverse_root(*factor(moment), floor=0.0)
    assert torch.allclose(torch.outer(a, b), moment.rsqrt(), rtol=1e-9)


def test_unseen_rows_get_a_bounded_scale_and_an_empty_moment_none() -> None:
    moment = torch.ones(4, 3)
    moment[2] = 0
    rows, columns = factor(moment)
    a, b = inverse_root(rows, columns)
    of_mean_row = float((rows.mean().sqrt() / rows.mean()).sqrt())
    assert abs(float(a[2]) / of_mean_row / 100 - 1) < 1e-9
    a, b = inverse_root(*factor(torch.zeros(4, 3)))
    assert torch.equal(a, torch.ones(4, dtype=a.dtype))
    assert torch.equal(b, torch.ones(3, dtype=b.dtype))


def test_means_far_below_their_own_mean_are_lifted():
    rows, columns = lifted(torch.tensor([0.0, 1.0, 2.0]), torch.tensor([3.0, 3.0]), floor=0.25)
    assert rows.tolist() == [0.25, 1.0, 2.0]
    assert columns.tolist() == [3.0, 3.0]


def test_the_root_of_the_mean_is_over_all_entries():
    moments = [torch.rand(3, 5).double(), 9 * torch.rand(4, 2).double()]
    every = torch.cat([moment.flatten() for moment in moments])
    assert root_mean(factor(m) for m in moments) == pytest.approx(float(every.mean().sqrt()), rel=1e-12)
    assert root_mean([]) == 1.0
    assert root_mean([factor(torch.zeros(2, 2))]) == 1.0
