"""Other libraries' metrics, computed as they document them: inputs must arrive in their order and with their sign."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from trainer_attrib.analysis.influence_results import Influence, InfluenceExamples
from trainer_attrib.errors import EvaluationError
from trainer_attrib.evaluation.adapters import (
    scores_of,
    to_dattri,
    to_dattri_lds,
    to_dattri_loo,
    to_dattri_mislabel,
    to_quanda,
    to_quanda_datamodeling,
)
from trainer_attrib.evaluation.correlation import pearson, spearman
from trainer_attrib.evaluation.datamodeling import datamodeling_score
from trainer_attrib.evaluation.subsets import all_but_one, all_but_one_group, random_subsets


def influence_of(ids, stages=None):
    stages = stages or ["sft"] * len(ids)
    examples = InfluenceExamples(
        np.array(stages, object), np.array(ids, object), np.arange(len(ids)), [None] * len(ids), [None] * len(ids)
    )
    scores = np.arange(2.0 * len(ids), dtype=np.float32).reshape(2, -1)
    return Influence(("b", "b"), ("q", "r"), scores, examples, "grad_cos")


def test_scores_come_in_the_order_that_is_asked_for():
    assert scores_of(influence_of(["a", "b", "c"]), ["c", "a"]).tolist() == [[2, 0], [5, 3]]
    both = influence_of(["a", "b", "a"], ["pretrain", "sft", "sft"])
    assert scores_of(both, ["a", "b"], stage="sft").tolist() == [[2, 1], [5, 4]]
    with pytest.raises(EvaluationError, match="1 examples were scored in several stages"):
        scores_of(both, ["a"])
    with pytest.raises(EvaluationError, match="1 of 2 examples have no score, the first is 'x'"):
        scores_of(both, ["b", "x"], stage="sft")


def dattri_lds(score, ground_truth):
    """``dattri.metric.lds`` 0.3: score [train, test], values [subsets, test], positions [subsets, size]."""
    values, positions = ground_truth
    predicted = torch.stack([score[each].sum(0) for each in positions])
    return spearman(predicted.numpy().T, values.numpy().T)


def dattri_loo(score, ground_truth):
    """``dattri.metric.loo_corr`` 0.3: score [removed, test] with values [removed, test]."""
    return pearson(score.numpy().T, ground_truth[0].numpy().T)


def test_datamodeling_scores_are_the_same_in_dattris_order(world, tmp_path):
    made, subsets = world(noise=1.0), random_subsets(12, 9)
    measured = made.store(tmp_path).measure(subsets, (0, 1))
    score, (values, positions) = to_dattri_lds(made.effects, subsets, measured)
    assert (score.shape, values.shape, positions.shape) == ((12, 3), (9, 3), (9, 6))
    found = dattri_lds(score, (values, positions))
    np.testing.assert_allclose(found, datamodeling_score(made.effects, subsets, measured).per_query)


def test_removal_has_the_sign_that_dattri_correlates(world, tmp_path):
    made, subsets = world(), all_but_one(12, [7, 2, 11, 5])
    score, (values, removed) = to_dattri_loo(made.effects, subsets, made.store(tmp_path).measure(subsets))
    assert removed.tolist() == [7, 2, 11, 5]
    np.testing.assert_allclose(dattri_loo(score, (values, removed)), 1.0)
    assert torch.equal(score, to_dattri(made.effects)[[7, 2, 11, 5]])


def test_what_dattri_cannot_hold_is_refused():
    scores, measured = np.ones((1, 4)), np.arange(3.0)[:, None]
    uneven = np.array([[1, 1, 0, 0], [1, 1, 1, 0], [0, 1, 1, 0]], bool)
    with pytest.raises(EvaluationError, match="Subsets have 2 to 3 examples"):
        to_dattri_lds(scores, uneven, measured)
    with pytest.raises(EvaluationError, match="more or fewer than one"):
        to_dattri_loo(scores, all_but_one_group(list("abcc"))[0], measured)


def test_suspicion_stays_as_it_is():
    score, noisy = to_dattri_mislabel(np.array([0.5, 2.0]), np.array([0, 1]))
    assert score.tolist() == [0.5, 2.0]
    assert torch.where(noisy)[0].tolist() == [1]


def test_quanda_gets_queries_by_examples_and_the_values_of_every_subset(world, tmp_path):
    """``LinearDatamodelingMetric.update`` 0.5 sums explanations over ``subset_ids`` and correlates with the values."""
    made, subsets = world(noise=1.0), random_subsets(12, 9)
    measured = made.store(tmp_path).measure(subsets)
    init, update = to_quanda_datamodeling(made.effects, subsets, measured)
    assert init["m"] == len(init["subset_ids"]) == len(init["subset_ckpt_filenames"]) == 9
    assert torch.equal(update["explanations"], to_quanda(made.effects))
    assert (update["explanations"].dtype, update["explanations"].shape) == (torch.float32, (3, 12))
    predicted = torch.stack([update["explanations"][:, ids].sum(1) for ids in init["subset_ids"]], 1)
    outputs = torch.stack([update["subset_logits"][m] for m in range(9)], 1)
    assert all(update["subset_logits"][m].ndim == 1 for m in range(9))  # one dimension: taken as they are
    expected = datamodeling_score(made.effects, subsets, measured).per_query
    np.testing.assert_allclose(spearman(predicted.numpy(), outputs.numpy()), expected)
