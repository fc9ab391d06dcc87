from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer_attrib.errors import EvaluationError
from trainer_attrib.evaluation.detection import detection


def test_a_case_with_a_tie_by_hand():
    """Of four pairs three are right and one ties; DeLong's variance is var([1, 3/4]) / 2 twice."""
    found = detection(np.array([3.0, 2.0, 2.0, 1.0]), np.array([True, True, False, False]))
    assert found.auc.value == 3.5 / 4
    assert found.auc.standard_error == pytest.approx(np.sqrt(2 * (0.25**2 / 2) / 2))
    # One bad example of one, then both of three: 1/2 * 1 + 1/2 * 2/3.
    assert found.average_precision.value == pytest.approx(5 / 6)
    assert (found.bad, found.clean, found.chance) == (2, 2, 0.5)


def test_suspicion_that_says_nothing_is_chance():
    found = detection(np.zeros(10), np.arange(10) < 3)
    assert found.auc.value == 0.5
    assert found.auc.standard_error == 0
    assert found.average_precision.value == pytest.approx(found.chance) == 0.3


def test_the_right_order_is_one_and_the_wrong_one_zero():
    suspicion, bad = np.arange(8.0), np.arange(8) >= 5
    assert detection(suspicion, bad).auc.value == 1
    assert detection(suspicion, bad).average_precision.value == 1
    assert detection(-suspicion, bad).auc.value == 0


@settings(deadline=None, max_examples=30)
@given(st.lists(st.tuples(st.integers(0, 4), st.booleans()), min_size=2, max_size=12), st.integers(0, 99))
def test_it_counts_pairs_whatever_their_order(examples, seed):
    suspicion, bad = np.array([s for s, _ in examples], float), np.array([b for _, b in examples])
    if bad.all() or not bad.any():
        bad[0] = not bad[0]
    pairs = suspicion[bad][:, None] - suspicion[~bad]
    found = detection(suspicion, bad)
    assert found.auc.value == pytest.approx(((pairs > 0) + 0.5 * (pairs == 0)).mean())
    seen = [(suspicion >= s, s) for s in suspicion[bad]]
    assert found.average_precision.value == pytest.approx(np.mean([bad[among].mean() for among, _ in seen]))
    order = np.random.default_rng(seed).permutation(len(bad))
    again = detection(suspicion[order], bad[order])
    assert again.auc.value == pytest.approx(found.auc.value)
    assert again.average_precision.value == pytest.approx(found.average_precision.value)


def test_standard_errors_are_the_spread_over_data_sets():
    random, aucs, precisions = np.random.default_rng(0), [], []
    bad = np.arange(120) < 40
    for _ in range(80):
        aucs.append((found := detection(bad + random.normal(size=120), bad)).auc)
        precisions.append(found.average_precision)
    for each in (aucs, precisions):
        spread = np.std([one.value for one in each])
        assert np.mean([one.standard_error for one in each]) == pytest.approx(spread, rel=0.2)


def test_confusable_examples_alone_are_harder():
    suspicion = np.array([5.0, 4.0, 6.0, 1.0, 1.0, 1.0])
    bad, confusable = np.arange(6) < 2, np.arange(6) < 4
    assert detection(suspicion, bad).auc.value == 6 / 8
    found = detection(suspicion, bad, confusable)
    assert found.auc.value == 2 / 4
    assert found.clean == 2
    assert "2 bad of 4" in str(found)


@pytest.mark.parametrize(
    ("suspicion", "bad", "said"),
    [
        (np.ones(3), np.zeros(3, bool), "Found 0 bad and 3 clean"),
        (np.ones(3), np.ones(4, bool), "examples with suspicion: 3, examples that may be bad: 4"),
        (np.array([1.0, np.nan, 1.0]), np.arange(3) < 1, "1 of the 3 entries of suspicion are not finite"),
    ],
)
def test_what_cannot_be_told_is_refused(suspicion, bad, said):
    with pytest.raises(EvaluationError, match=said):
        detection(suspicion, bad)
