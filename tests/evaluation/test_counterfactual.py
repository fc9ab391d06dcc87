from __future__ import annotations

import numpy as np
import pytest
import torch

from trainer_attrib.analysis.behavior import Behavior
from trainer_attrib.errors import EvaluationError
from trainer_attrib.evaluation.subsets import random_subsets


def test_every_model_is_trained_once_and_read_bit_for_bit(world, tmp_path):
    made = world(noise=1.0)
    subsets, store = random_subsets(12, 5), made.store(tmp_path)
    assert store.missing(subsets, (0, 7)) == 10
    first = store.measure(subsets, (0, 7))
    assert first.shape == (5, 2, 3)
    assert first.dtype == np.float64
    assert len(made.trained) == 10
    assert made.trained[:2] == [(tuple(np.flatnonzero(subsets[0])), 0), (tuple(np.flatnonzero(subsets[0])), 7)]
    again = made.store(tmp_path, train=None)
    assert again.missing(subsets, (0, 7)) == 0
    assert (again.measure(subsets[::-1], (7, 0)) == first[::-1, ::-1]).all()
    assert len(made.trained) == 10
    np.testing.assert_allclose(first[:, 0], made.behavior_of(subsets, 0), rtol=1e-12)


def test_a_subset_that_is_asked_twice_is_trained_once(world, tmp_path):
    made = world()
    values = made.store(tmp_path).measure(np.ones((3, 12), bool))
    assert len(made.trained) == 1
    assert (values == values[0]).all()


def test_an_interrupted_call_goes_on_where_it_stopped(world, tmp_path):
    made, subsets = world(), random_subsets(12, 5)
    expected = made.store(tmp_path / "whole").measure(subsets)
    made.trained.clear()

    def failing(positions, seed):
        if len(made.trained) == 3:
            raise KeyboardInterrupt
        return made.train(positions, seed)

    with pytest.raises(KeyboardInterrupt):
        made.store(tmp_path / "parts", train=failing).measure(subsets)
    (tmp_path / "parts" / "values" / ".writing-x").write_bytes(b"half a file")  # what a killed writer leaves
    store = made.store(tmp_path / "parts")
    assert store.missing(subsets) == 2
    assert (store.measure(subsets) == expected).all()
    assert len(made.trained) == 5


def test_training_that_ignores_its_seed_is_found(world, tmp_path):
    made, mask = world(noise=1.0), np.ones(12, bool)
    assert made.store(tmp_path / "kept").repeat_error(mask, seed=3) == 0

    def careless(positions, seed):
        return made.train(positions, len(made.trained))

    assert made.store(tmp_path / "broken", train=careless).repeat_error(mask, seed=3) > 0.1
    with pytest.raises(EvaluationError, match="opened without `train`: 1"):
        made.store(tmp_path / "kept", train=None).repeat_error(mask, seed=3)


def test_values_may_lie_on_an_object_store(world):
    made, subsets = world(), random_subsets(12, 3)
    first = made.store("memory://retrained-models").measure(subsets)
    assert (made.store("memory://retrained-models", train=None).measure(subsets) == first).all()


def test_several_behaviors_stand_side_by_side(world, tmp_path):
    made = world()
    other = Behavior("first weight", [0], lambda model, items: model.weight[0, :1])
    values = made.store(tmp_path, behaviors=[made.behavior, other]).of_all((0,))
    assert values.shape == (1, 4)
    assert values[0, 3] == pytest.approx(float(made.examples[:, 0].sum()))


def test_values_of_other_models_are_refused(world, tmp_path):
    made = world()
    made.store(tmp_path)
    renamed = Behavior("other", list(made.queries), made.behavior.measure)
    for options, said in (
        ({"examples": made.ids[::-1]}, "other examples"),
        ({"examples": made.ids[:5]}, r"other examples: .*'count': 12"),
        ({"behaviors": [renamed]}, "other behaviors"),
        ({"recipe": "two steps"}, "other recipe: one step, expected two steps"),
    ):
        with pytest.raises(EvaluationError, match=said):
            made.store(tmp_path, **options)
    with pytest.raises(EvaluationError, match="1 of the 2 example ids repeat"):
        made.store(tmp_path / "new", examples=["a", "a"])


def test_without_a_training_function_it_says_what_is_missing(world, tmp_path):
    with pytest.raises(EvaluationError, match="opened without `train`: 2"):
        world().store(tmp_path, train=None).measure(random_subsets(12, 2))


def test_a_damaged_file_is_named_and_only_that_model_is_trained_again(world, tmp_path):
    made, subsets = world(), random_subsets(12, 3)
    store = made.store(tmp_path)
    expected = store.measure(subsets)
    files = sorted((tmp_path / "values").iterdir())
    files[0].write_bytes(files[0].read_bytes()[:-9])
    with pytest.raises(EvaluationError, match=files[0].name):
        store.measure(subsets)
    files[0].write_bytes(files[1].read_bytes())  # another subset's
    with pytest.raises(EvaluationError, match="values of its subset"):
        store.measure(subsets)
    files[0].unlink()
    assert store.missing(subsets) == 1
    assert (store.measure(subsets) == expected).all()


def test_a_diverged_training_is_not_stored(world, tmp_path):
    made = world()

    def diverging(positions, seed):
        model = made.train(positions, seed)
        torch.nn.init.constant_(model.weight, float("inf"))
        return model

    store = made.store(tmp_path, train=diverging)
    with pytest.raises(EvaluationError, match=r"6 of 12 examples with seed 4.*not finite"):
        store.measure(random_subsets(12, 1), (4,))
    assert store.missing(random_subsets(12, 1), (4,)) == 1


@pytest.mark.parametrize("subsets", [np.ones((2, 12)), np.ones(12, bool), np.arange(12)[None]])
def test_subsets_are_masks(world, tmp_path, subsets):
    with pytest.raises(EvaluationError, match="expected a boolean mask"):
        world().store(tmp_path).measure(subsets)


def test_masks_have_a_column_per_example(world, tmp_path):
    with pytest.raises(EvaluationError, match="columns of the masks: 11, examples: 12"):
        world().store(tmp_path).measure(np.ones((2, 11), bool))
