from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer_attrib.evaluation.correlation import pearson, ranks, spearman

small = st.lists(st.integers(-3, 3), min_size=4, max_size=9)


def test_ranks_share_the_mean_of_a_tie():
    rows = np.array([[3.0, 1.0, 3.0, 2.0], [5.0, 5.0, 5.0, 5.0], [0.0, -0.0, -1.0, 1e300]])
    assert ranks(rows).tolist() == [[2.5, 0, 2.5, 1], [1.5, 1.5, 1.5, 1.5], [1.5, 1.5, 0, 3]]
    assert ranks(rows[0]).tolist() == [2.5, 0, 2.5, 1]


@given(small)
def test_ranks_are_counts_of_what_is_below(values):
    values = np.array(values, float)
    below = (values[None] < values[:, None]).sum(1) + ((values[None] == values[:, None]).sum(1) - 1) / 2
    assert ranks(values).tolist() == below.tolist()


def test_known_values():
    assert spearman(np.array([1.0, 2, 3, 4]), np.array([1.0, 3, 2, 4])) == pytest.approx(0.8)  # 1 - 6 * 2 / (4 * 15)
    assert pearson(np.array([1.0, 2, 3]), np.array([1.0, 2, 4])) == pytest.approx(3 / np.sqrt(2 * 14 / 3))
    assert spearman(np.array([1.0, 1, 2]), np.array([1.0, 2, 3])) == pytest.approx(np.sqrt(3) / 2)


def test_constants_have_no_order():
    """0.1 three times has a mean that is not 0.1: rounding must not become an order."""
    constant, varying = np.full(3, 0.1), np.array([1.0, 2.0, 4.0])
    assert constant.mean() != 0.1
    for correlate in (pearson, spearman):
        assert correlate(constant, varying) == 0
        assert np.isnan(correlate(varying, constant))
        assert np.isnan(correlate(constant, constant))


@settings(deadline=None)
@given(small, st.randoms(use_true_random=False))
def test_an_order_of_the_columns_does_not_matter_and_a_monotone_map_neither(values, random):
    values = np.array(values, float)
    other = np.array(random.sample(range(20), len(values)), float)
    order = np.array(random.sample(range(len(values)), len(values)))
    found = spearman(values, other)
    assert spearman(values[order], other[order]) == pytest.approx(found, abs=1e-12)
    assert spearman(np.exp(values), other**3) == pytest.approx(found, abs=1e-12)
    assert -1 <= pearson(values, other) <= 1
