from __future__ import annotations

import numpy as np
import pytest

from trainer_attrib.errors import EvaluationError
from trainer_attrib.evaluation.removal import removal_curve


def test_exact_scores_give_the_largest_effects(world, tmp_path):
    """Effects add up here: the curve is the sum of the largest ones, and no ranking's can be above it."""
    made = world()
    store = made.store(tmp_path)
    worst = np.random.default_rng(0).normal(size=made.effects.shape)
    found = removal_curve(store, {"exact": made.effects, "other": worst}, (1, 4), draws=2)
    largest = -np.sort(-made.effects, axis=1)
    np.testing.assert_allclose(found.effects["exact"], [largest[:, 0], largest[:, :4].sum(1)], rtol=1e-12)
    assert (found.effects["other"] <= found.effects["exact"] + 1e-12).all()
    assert found.at("exact", 4).value == pytest.approx(largest[:, :4].sum(1).mean())
    difference = found.effects["exact"][1] - found.effects["random"][1]
    assert found.beyond("exact", "random", 4).value == pytest.approx(difference.mean())
    assert found.beyond("exact", "random", 4).standard_error == pytest.approx(difference.std(ddof=1) / np.sqrt(3))
    assert str(found).splitlines()[0].split() == ["removed", "top", "1", "top", "4"]


def test_random_removal_is_measured_on_the_same_sets_for_every_query(world, tmp_path):
    made = world()
    store = made.store(tmp_path)
    found = removal_curve(store, {}, (3,), draws=4)
    without = [set(range(12)) - set(positions) for positions, _ in made.trained if len(positions) == 9]
    assert len(without) == 4
    expected = np.mean([made.effects[:, sorted(gone)].sum(1) for gone in without], axis=0)
    np.testing.assert_allclose(found.effects["random"], expected[None], rtol=1e-12)


def test_some_queries_cost_their_own_models_only(world, tmp_path):
    made = world()
    store = made.store(tmp_path)
    found = removal_curve(store, {"exact": made.effects}, (1, 2), seeds=(0, 1), queries=(2,), draws=1)
    assert len(made.trained) == 2 * (1 + 2 + 2)
    assert found.queries == (2,)
    assert found.effects["random"].shape == found.effects["exact"].shape == (2, 1)
    every = removal_curve(store, {}, (1, 2), seeds=(0, 1), draws=1)
    assert (every.effects["random"][:, 2:] == found.effects["random"]).all()
    assert found.effects["exact"][0, 0] == pytest.approx(made.effects[2].max())
    removal_curve(store, {"exact": made.effects}, (1, 2), seeds=(0, 1), queries=(2,), draws=1)
    assert len(made.trained) == 10


def test_a_seed_is_compared_with_itself(world, tmp_path):
    """Seeds that shift the behavior alike leave the effect as it is."""
    made = world()

    def shifted(positions, seed):
        model = made.train(positions, seed)
        model.weight.data += 100.0 * seed
        return model

    found = removal_curve(made.store(tmp_path, train=shifted), {"exact": made.effects}, (1,), seeds=(0, 5))
    np.testing.assert_allclose(found.effects["exact"][0], made.effects.max(1), rtol=1e-9)


@pytest.mark.parametrize(
    ("rankings", "counts", "said"),
    [
        ({"random": np.ones((3, 12))}, (1,), "is called 'random'"),
        ({"a": np.ones((3, 11))}, (1,), "examples of the scores: 11"),
        ({"a": np.ones((2, 12))}, (1,), "queries of the scores: 2"),
        ({"a": np.full((3, 12), np.inf)}, (1,), "36 of the 36 entries of the scores of 'a'"),
        ({}, (12,), r"Cannot remove \[12\] of 12"),
    ],
)
def test_what_cannot_be_removed_is_refused(world, tmp_path, rankings, counts, said):
    with pytest.raises(EvaluationError, match=said):
        removal_curve(world().store(tmp_path), rankings, counts)
