from __future__ import annotations

import numpy as np
import pytest

from trainer_attrib.errors import EvaluationError
from trainer_attrib.evaluation.agreement import agreement, seed_agreement
from trainer_attrib.evaluation.correlation import spearman
from trainer_attrib.evaluation.datamodeling import datamodeling_score
from trainer_attrib.evaluation.leaving_out import left_out_agreement
from trainer_attrib.evaluation.subsets import all_but_one, all_but_one_group, random_subsets


def test_exact_effects_order_the_retrained_models_perfectly(world, tmp_path):
    """The sign of the project: scores that say what training on an example adds."""
    made = world()
    subsets = random_subsets(12, 20)
    measured = made.store(tmp_path).measure(subsets)
    found = datamodeling_score(made.effects, subsets, measured)
    np.testing.assert_allclose(found.per_query, 1.0, rtol=1e-12)
    assert found.mean.value == pytest.approx(1.0)
    assert found.subset_error == pytest.approx(0.0, abs=1e-12)
    assert (found.subsets, found.seeds, found.ceiling) == (20, 1, None)
    assert datamodeling_score(-made.effects, subsets, measured).mean.value == pytest.approx(-1.0)


def test_a_small_case_by_hand():
    scores = np.array([[4.0, 2.0, 1.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    subsets = np.array([[1, 1, 0, 0], [1, 0, 1, 0], [0, 1, 1, 0], [0, 0, 1, 1]], bool)  # predicted 6, 5, 3, 1
    measured = np.array([[9.0, 1.0], [7.0, 2.0], [8.0, 3.0], [1.0, 4.0]])  # ranks 3, 1, 2, 0: one swap, 1 - 6 * 2 / 60
    found = datamodeling_score(scores, subsets, measured)
    assert found.per_query.tolist() == pytest.approx([0.8, 0.0])
    assert found.mean.value == pytest.approx(0.4)
    assert found.mean.standard_error == pytest.approx(0.4)  # half the distance of two values
    assert np.isnan(found.subset_error)  # four subsets do not tell
    assert str(found).startswith("spearman 0.400 ± 0.400 over queries (4 subsets), ceiling not known from one seed")


def test_the_order_of_examples_queries_and_subsets_does_not_matter(world, tmp_path):
    made, random = world(noise=2.0), np.random.default_rng(1)
    subsets = random_subsets(12, 15)
    measured = made.store(tmp_path).measure(subsets, seeds=(0, 1))
    scores = made.effects + random.normal(size=made.effects.shape)
    first = datamodeling_score(scores, subsets, measured)
    n, m, q = random.permutation(12), random.permutation(15), random.permutation(3)
    second = datamodeling_score(scores[q][:, n], subsets[m][:, n], measured[m][:, :, q])
    np.testing.assert_allclose(second.per_query, first.per_query[q], rtol=1e-12)
    for name in ("subset_error", "seed_agreement", "ceiling"):
        assert getattr(second, name) == pytest.approx(getattr(first, name), rel=1e-9)


def test_the_ceiling_is_the_correlation_of_the_truth_itself():
    """Noise as large as the signal: two seeds agree by 1/2, the mean of four has reliability 4/5."""
    random = np.random.default_rng(0)
    truth_MQ = random.normal(size=(1500, 20))
    measured_MSQ = truth_MQ[:, None] + random.normal(size=(1500, 4, 20))
    found = agreement(truth_MQ, measured_MSQ, "pearson")
    assert found.seed_agreement == pytest.approx(0.5, abs=0.01)
    assert found.ceiling == pytest.approx(np.sqrt(0.8), abs=0.01)
    assert found.mean.value == pytest.approx(found.ceiling, abs=0.01)
    ranked = agreement(truth_MQ, measured_MSQ)
    assert ranked.mean.value == pytest.approx(ranked.ceiling, abs=0.02)  # with ranks it is an approximation


def test_seeds_that_agree_by_chance_leave_no_room():
    measured_MSQ = np.array([[1.0, 4], [2, 3], [3, 2], [4, 1]])[:, :, None]
    assert seed_agreement(measured_MSQ) == pytest.approx(-1.0)
    measured_MSQ = measured_MSQ + np.array([0.0, 0.1, 0.2, 0.4])[:, None, None]
    assert agreement(np.arange(4.0)[:, None], measured_MSQ).ceiling == 0


def test_the_error_over_subsets_is_the_spread_over_draws_of_subsets():
    random, means, errors = np.random.default_rng(0), [], []
    for _ in range(200):
        truth = random.normal(size=(30, 4))
        found = agreement(truth + random.normal(size=(30, 4)), truth)
        means.append(found.mean.value)
        errors.append(found.subset_error)
    assert np.mean(errors) == pytest.approx(np.std(means), rel=0.15)


def test_leaving_out_in_groups_of_the_jackknife_gives_a_similar_error():
    random = np.random.default_rng(0)
    truth_QM = random.normal(size=(4, 300))
    noisy_QM = truth_QM + random.normal(size=(4, 300))
    one_by_one = [spearman(np.delete(noisy_QM, m, 1), np.delete(truth_QM, m, 1)).mean() for m in range(300)]
    assert agreement(noisy_QM.T, truth_QM.T).subset_error == pytest.approx(np.sqrt(299) * np.std(one_by_one), rel=0.2)


def test_queries_that_never_vary_are_left_out_and_said():
    measured = np.array([[1.0, 5], [2, 5], [3, 5]])
    found = agreement(measured, measured)
    assert found.left_out == 1
    assert found.mean.value == pytest.approx(1)
    assert "1 queries without variation left out" in str(found)


@pytest.mark.parametrize(
    ("scores", "subsets", "measured", "said"),
    [
        (
            np.ones((2, 5)),
            np.ones((3, 4), bool),
            np.ones((3, 2)),
            "examples of the scores: 5, examples of the subsets: 4",
        ),
        (np.ones((2, 4)), np.ones((3, 4), bool), np.ones((3, 1)), "queries of the prediction: 2"),
        (np.ones((2, 4)), np.ones((3, 4), bool), np.ones((4, 2)), "subsets of the prediction: 3"),
        (np.ones((2, 4)), np.ones((2, 4), bool), np.ones((2, 2)), "over 2 subsets says nothing"),
        (np.ones((2, 4)), np.ones((3, 4), bool), np.ones((3, 2)), "is the same in all 3 subsets"),
        (
            np.full((2, 4), np.nan),
            np.ones((3, 4), bool),
            np.ones((3, 2)),
            "8 of the 8 entries of scores are not finite",
        ),
        (np.ones(4), np.ones((3, 4), bool), np.ones((3, 2)), r"scores has shape \(4,\), expected \[Q, N\]"),
    ],
)
def test_what_does_not_fit_is_refused(scores, subsets, measured, said):
    with pytest.raises(EvaluationError, match=said):
        datamodeling_score(scores, subsets, measured)


def test_an_unknown_correlation_is_refused():
    with pytest.raises(EvaluationError, match="use one of"):
        agreement(np.ones((3, 1)), np.ones((3, 1)), "kendall")


def test_leaving_one_out_has_the_sign_of_the_scores(world, tmp_path):
    made = world()
    store, subsets = made.store(tmp_path), all_but_one(12)
    found = left_out_agreement(made.effects, subsets, store.measure(subsets), store.of_all())
    np.testing.assert_allclose(found.predicted, made.effects.T)
    np.testing.assert_allclose(found.measured, made.effects.T, atol=1e-12)
    np.testing.assert_allclose(found.spearman.per_query, 1.0)
    np.testing.assert_allclose(found.pearson.per_query, 1.0)
    assert np.isnan(found.noise).all()
    assert "noise not known" in str(found)


def test_leaving_groups_out_adds_up_and_seeds_show_the_noise(world, tmp_path):
    made = world(noise=0.5, width=40)
    store, (subsets, names) = made.store(tmp_path), all_but_one_group(list("aabbccddeeff"))
    assert names == list("abcdef")
    seeds = tuple(range(30))
    found = left_out_agreement(made.effects, subsets, store.measure(subsets, seeds), store.of_all(seeds))
    np.testing.assert_allclose(found.predicted, made.effects.reshape(3, 6, 2).sum(2).T)
    expected = (
        0.5 * np.sqrt(2) * np.linalg.norm(made.queries.numpy(), axis=1) / np.sqrt(30)
    )  # two noisy models, 30 seeds
    np.testing.assert_allclose(found.noise, expected, rtol=0.2)
    assert found.pearson.ceiling > 0.98
    assert found.pearson.mean.value > 0.95


def test_subsets_are_the_same_everywhere_and_the_first_stay_when_more_are_drawn():
    subsets = random_subsets(9, 4, seed=3)
    assert subsets.sum(1).tolist() == [4, 4, 4, 4]
    assert [np.flatnonzero(mask).tolist() for mask in subsets[:2]] == [
        [4, 5, 6, 7],
        [2, 3, 4, 5],
    ]  # pinned: caches outlive versions
    assert (random_subsets(9, 40, seed=3)[:4] == subsets).all()
    assert (random_subsets(9, 4, seed=4) != subsets).any()
    np.testing.assert_allclose(random_subsets(20, 4000, 0.25).mean(0), 0.25, atol=0.03)
    assert all_but_one(4, [2]).tolist() == [[True, True, False, True]]
    with pytest.raises(EvaluationError, match="0 of 3 examples"):
        random_subsets(3, 1, 0.1)
