from __future__ import annotations

import numpy as np
import pytest
import torch

from trainer_attrib.numerics.row_curvature import (
    SecondMoments,
    damped_inverse,
    inverse_root,
    mixing_weight,
    shrunk,
    whiten,
)

SPANS = [slice(0, 3), slice(3, 5)]


def rows(count=200, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 5, generator=generator) * torch.tensor([3.0, 1.0, 0.3, 2.0, 0.1])


def test_second_moments_are_block_by_block_and_do_not_depend_on_the_split():
    moments = SecondMoments(SPANS)
    moments.add(rows()[:7])
    moments.add(rows()[7:])
    for mean, span in zip(moments.means(), SPANS, strict=True):
        torch.testing.assert_close(mean, (rows()[:, span].T @ rows()[:, span] / 200).double(), rtol=1e-5, atol=1e-6)


def test_whitened_rows_have_unit_second_moments_in_every_block():
    moments = SecondMoments(SPANS)
    moments.add(rows())
    white = whiten(rows(), SPANS, [inverse_root(m) for m in moments.means()])
    for span in SPANS:
        found = white[:, span].T @ white[:, span] / 200
        torch.testing.assert_close(found, torch.eye(span.stop - span.start), rtol=1e-4, atol=1e-4)


def test_shrinking_all_of_a_moment_leaves_a_multiple_of_the_identity():
    moment = torch.diag(torch.tensor([4.0, 1.0, 1.0])).double()
    torch.testing.assert_close(inverse_root(shrunk(moment, 1.0)), torch.eye(3) / 2**0.5)
    half = inverse_root(shrunk(moment, 0.5))
    torch.testing.assert_close(half.diagonal(), torch.tensor([3.0, 1.5, 1.5]).rsqrt())


def test_directions_without_variance_answer_nothing():
    assert torch.equal(inverse_root(torch.zeros(2, 2).double()), torch.zeros(2, 2))
    assert torch.equal(damped_inverse(torch.zeros(2, 2).double(), 0.1), torch.zeros(2, 2))


def test_the_damped_inverse_is_that_of_the_moment_plus_its_mean_eigenvalue():
    moment = rows()[:, :3].T.double() @ rows()[:, :3].double() / 200
    slack = 0.1 * torch.linalg.eigvalsh(moment).mean()
    product = damped_inverse(moment, 0.1).double() @ (moment + slack * torch.eye(3).double())
    torch.testing.assert_close(product, torch.eye(3).double(), rtol=1e-5, atol=1e-5)


def test_what_rows_share_is_their_mean_product_over_different_pairs():
    drawn, moments = rows(12).double() + 1, SecondMoments([slice(0, 5)])
    moments.add(drawn)
    pairs = [torch.outer(a, b) for i, a in enumerate(drawn) for j, b in enumerate(drawn) if i != j]
    values, vectors = torch.linalg.eigh(torch.stack(pairs).mean(0))
    expected = vectors @ torch.diag(values.clamp_min(0)) @ vectors.T
    torch.testing.assert_close(moments.shared()[0], expected, rtol=1e-5, atol=1e-5)
    alone = SecondMoments([slice(0, 5)])
    alone.add(drawn[:1])
    assert torch.equal(alone.shared()[0], torch.zeros(5, 5).double())


def test_the_spectra_cross_at_the_place():
    task = [torch.diag(torch.tensor([8.0, 2.0])).double(), torch.tensor([[1.0]]).double()]
    train = [torch.diag(torch.tensor([4.0, 3.0])).double(), torch.tensor([[0.5]]).double()]
    weight = mixing_weight(task, train, 1)
    assert weight == pytest.approx(3 / (2 + 3))
    assert weight * 2 == pytest.approx((1 - weight) * 3)
    assert mixing_weight([torch.zeros(3, 3).double()], [torch.eye(3).double()], 1) == 0


@pytest.mark.parametrize("count", [8, 400])
def test_the_chosen_shrinkage_beats_none_and_all_on_average(count):
    """Mean squared distance to the true second moment over draws, which is what the choice minimises."""
    scales = torch.tensor([3.0, 1.0, 0.3, 2.0, 0.1])
    truth, errors = torch.diag(scales**2).double(), []
    for seed in range(60):
        drawn = rows(count, seed).double()
        moments = SecondMoments([slice(0, 5)])
        moments.add(drawn)
        [moment], [share] = moments.means(), moments.noise()
        assert 0 <= share <= 1
        errors.append([float(((shrunk(moment, s) - truth) ** 2).sum()) for s in (share, 0.0, 1.0)])
    chosen, none, everything = np.mean(errors, axis=0)
    assert chosen < none
    assert chosen < everything
