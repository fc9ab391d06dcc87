from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer_attrib.numerics.krylov import apply_function, decay, response


def operator(size: int, rank: int, seed: int):
    generator = torch.Generator().manual_seed(seed)
    factor = torch.randn(size, rank, generator=generator, dtype=torch.float64)
    return factor @ factor.T / rank, torch.randn(size, generator=generator, dtype=torch.float64)


@given(st.integers(2, 12), st.integers(1, 12), st.floats(0.0, 5.0), st.integers(0, 100))
@settings(max_examples=60, deadline=None)
def test_enough_products_give_the_matrix_exponential(size, rank, time, seed):
    matrix, vector = operator(size, min(rank, size), seed)
    found = apply_function(lambda v: matrix @ v, vector, decay(time), size + 1)
    torch.testing.assert_close(found, torch.linalg.matrix_exp(-time * matrix) @ vector, rtol=1e-8, atol=1e-9)


@given(st.integers(2, 30), st.integers(1, 6), st.floats(0.0, 20.0), st.integers(0, 100))
@settings(max_examples=60, deadline=None)
def test_decay_never_lengthens_a_vector(size, products, time, seed):
    matrix, vector = operator(size, size, seed)
    matrix = matrix - 0.5 * torch.eye(size, dtype=torch.float64)  # indefinite: negative curvature counts as none
    found = apply_function(lambda v: matrix @ v, vector, decay(time), products)
    assert found.norm() <= vector.norm() * (1 + 1e-9)


def test_few_products_are_close_where_the_spectrum_decays():
    size = 200
    values = torch.logspace(0, -6, size, dtype=torch.float64)
    vector = torch.randn(size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = apply_function(lambda v: values * v, vector, decay(3.0), 6)
    assert (found - torch.exp(-3.0 * values) * vector).norm() < 1e-3 * vector.norm()


def test_response_is_the_integral_of_decay():
    matrix, vector = operator(6, 4, 1)
    steps = 4000
    times = (torch.arange(steps, dtype=torch.float64) + 0.5) * (2.0 / steps)
    values, vectors = torch.linalg.eigh(matrix)
    kernel = torch.stack([torch.exp(-t * values.clamp_min(0)) for t in times]).sum(0) * 2.0 / steps
    expected = vectors @ (kernel * (vectors.T @ vector))
    found = apply_function(lambda v: matrix @ v, vector, response(2.0), 7)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("function", [decay(1.5), response(1.5)])
def test_a_zero_operator_and_a_zero_vector(function):
    vector = torch.ones(3, dtype=torch.float64)
    at_zero = float(function(torch.zeros(1, dtype=torch.float64))[0])
    torch.testing.assert_close(apply_function(torch.zeros_like, vector, function, 4), at_zero * vector)
    assert not apply_function(lambda v: v, torch.zeros(3).double(), function, 4).any()
