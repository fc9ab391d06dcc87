"""Scores have the promised sign and range, and rankings do not depend on storage order."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer_attrib.numerics.scores import debiased, denoised, descent, grad_dot, rank, standardized
from trainer_attrib.numerics.sketching import unit_rows


def _data(seed: int, n: int = 7) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(3, 5, generator=generator), torch.randn(n, 5, generator=generator)


def test_training_that_raises_a_behavior_scores_positive() -> None:
    """A step on an example moves weights against its loss gradient; a behavior growing that way gets a plus."""
    loss_gradient = torch.tensor([[1.0, -2.0]])
    unit, norms = unit_rows(loss_gradient)
    assert float(grad_dot(-loss_gradient, unit, norms)) == 5.0
    assert abs(float(descent(-3 * loss_gradient) @ unit.T) - 1) < 1e-6


def test_dot_is_the_negative_inner_product() -> None:
    queries, rows = _data(0)
    unit, norms = unit_rows(rows)
    assert torch.allclose(grad_dot(queries, unit, norms), -queries @ rows.T, atol=1e-5)


@given(st.integers(0, 1000), st.floats(1e-3, 1e3))
@settings(deadline=None, max_examples=40)
def test_cosine_is_bounded_and_ignores_lengths(seed: int, length: float) -> None:
    queries, rows = _data(seed)
    unit, _ = unit_rows(rows)
    scores = descent(queries) @ unit.T
    assert float(scores.abs().max()) <= 1 + 1e-5
    assert torch.allclose(descent(queries * length) @ unit.T, scores, atol=1e-5)


def test_zero_sides_score_zero() -> None:
    queries, rows = _data(1)
    rows[2], queries[0] = 0, 0
    unit, _ = unit_rows(rows)
    scores = descent(queries) @ unit.T
    assert not scores[:, 2].any()
    assert not scores[0].any()


@given(st.integers(0, 1000), st.booleans())
@settings(deadline=None, max_examples=40)
def test_ranking_breaks_ties_by_id_whatever_the_order(seed: int, largest: bool) -> None:
    random = np.random.default_rng(seed)
    scores, ids = random.integers(0, 3, 12).astype(float), np.array([f"{i:02d}" for i in range(12)])
    order = random.permutation(12)
    first = ids[rank(scores, ids, 6, largest=largest)]
    second = ids[order][rank(scores[order], ids[order], 6, largest=largest)]
    assert first.tolist() == second.tolist()
    kept = np.sort(scores)[::-1][:6] if largest else np.sort(scores)[:6]
    assert scores[[ids.tolist().index(i) for i in first]].tolist() == kept.tolist()


def test_unknown_scores_are_not_ranked() -> None:
    assert rank(np.array([1.0, np.nan, 2.0]), np.array(["a", "b", "c"]), 3, largest=True).tolist() == [2, 0]


def test_standardized_scores_have_no_scale_of_their_own():
    scores_QN = np.random.default_rng(0).normal(3, 5, (3, 50)).astype(np.float32)
    scores_QN[1, :7] = np.nan
    found = standardized(scores_QN)
    np.testing.assert_allclose(np.nanmean(found, 1), 0, atol=1e-6)
    np.testing.assert_allclose(np.nanstd(found, 1), 1, rtol=1e-6)
    np.testing.assert_array_equal(np.isnan(found), np.isnan(scores_QN))
    np.testing.assert_allclose(standardized(1e-9 * scores_QN - 4e-9), found, rtol=1e-4, atol=1e-4)
    assert not standardized(np.full((1, 5), np.float32(0.1))).any()


def test_denoised_scores_are_a_mean_over_the_states_that_know_an_example():
    states_SQN = np.array([[[1.0, 2.0, np.nan]], [[3.0, np.nan, np.nan]]])
    np.testing.assert_allclose(denoised(states_SQN), [[2.0, 2.0, np.nan]])
    np.testing.assert_allclose(denoised(states_SQN, np.array([1, 3])), [[2.5, 2.0, np.nan]])
    np.testing.assert_allclose(denoised(states_SQN, np.array([0, 3])), [[3.0, np.nan, np.nan]])


def test_debiased_scores_lose_what_the_base_model_knew():
    scores_QN, base_QN = np.array([[1.0, 2.0, np.nan]]), np.array([[4.0, np.nan, 1.0]])
    np.testing.assert_allclose(debiased(scores_QN, base_QN, 0.5), [[-1.0, 2.0, np.nan]])
    np.testing.assert_allclose(debiased(scores_QN, base_QN, 0.0), scores_QN)
