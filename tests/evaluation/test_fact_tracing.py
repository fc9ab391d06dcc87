from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer_attrib.errors import EvaluationError
from trainer_attrib.evaluation.retrieval import fact_tracing, top


def test_several_relevant_examples_by_hand():
    """First query: places 2 and 4 of 5. Second: place 1 alone."""
    scores = np.array([[0.9, 0.8, 0.7, 0.6, 0.5], [0.1, 0.2, 0.3, 0.4, 0.5]])
    relevant = np.array([[0, 1, 0, 1, 0], [0, 0, 0, 0, 1]], bool)
    found = fact_tracing(scores, relevant, ks=(1, 2, 4))
    assert found.reciprocal_ranks.tolist() == [0.5, 1.0]
    assert found.mrr.value == 0.75
    assert found.mrr.standard_error == pytest.approx(0.25)
    assert [found.recall[k].value for k in (1, 2, 4)] == [0.5, 1, 1]
    assert [found.share_of_relevant[k].value for k in (1, 2, 4)] == [0.5, 0.75, 1]
    assert "MRR 0.750 ± 0.250, Recall@1 0.500 ± 0.500" in str(found)


def test_ties_count_as_their_expectation():
    """All of three tie and one is relevant: its place is 1, 2 or 3."""
    found = fact_tracing(np.zeros((1, 3)), np.array([False, True, False]), ks=(1, 2, 3))
    assert found.mrr.value == pytest.approx((1 + 1 / 2 + 1 / 3) / 3)
    assert [found.recall[k].value for k in (1, 2, 3)] == pytest.approx([1 / 3, 2 / 3, 1])


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.tuples(st.integers(0, 2), st.booleans()), min_size=1, max_size=6),
    st.integers(1, 7),
    st.randoms(use_true_random=False),
)
def test_it_is_the_mean_over_all_orders_of_tied_examples(examples, k, random):
    scores = np.array([score for score, _ in examples], float)
    relevant = np.array([mark for _, mark in examples])
    relevant[0] |= not relevant.any()
    orders = [o for o in permutations(range(len(scores))) if all(np.diff(scores[list(o)]) <= 0)]
    marks = np.array([relevant[list(order)] for order in orders])
    found = fact_tracing(scores[None], relevant[None], ks=(k,))
    assert found.mrr.value == pytest.approx(np.mean(1 / (1 + marks.argmax(1))))
    assert found.recall[k].value == pytest.approx(marks[:, :k].any(1).mean())
    assert found.share_of_relevant[k].value == pytest.approx(marks[:, :k].sum(1).mean() / relevant.sum())
    order = random.sample(range(len(scores)), len(scores))
    assert fact_tracing(scores[None, order], relevant[None, order]).mrr.value == pytest.approx(found.mrr.value)


def test_a_query_that_cannot_be_answered_is_refused():
    with pytest.raises(EvaluationError, match="1 of 2 queries have no relevant example"):
        fact_tracing(np.ones((2, 3)), np.array([[1, 0, 0], [0, 0, 0]], bool))
    with pytest.raises(EvaluationError, match="examples of the scores: 3, examples that may be relevant: 4"):
        fact_tracing(np.ones((2, 3)), np.ones(4, bool))
    with pytest.raises(EvaluationError, match="queries of the scores: 2"):
        fact_tracing(np.ones((2, 3)), np.ones((3, 3), bool))


def test_the_best_come_first_and_all_of_them_at_most():
    assert top(np.array([[1.0, 3.0, 2.0]]), 2).tolist() == [[1, 2]]
    assert top(np.array([[1.0, 3.0, 2.0]]), 5).tolist() == [[1, 2, 0]]
    assert len({tuple(top(np.zeros((1, 6)), 6, seed)[0]) for seed in range(5)}) > 1
