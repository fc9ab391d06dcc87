from __future__ import annotations

import pytest
import torch

from trainer_attrib.numerics.repeated_rows import EXAMPLES, PROBES, RepeatedRows
from trainer_attrib.numerics.row_curvature import SecondMoments

SPANS = [slice(0, 6), slice(6, 10)]
SCALES = torch.tensor([3.0, 1.0, 0.3, 2.0, 0.1, 1.0, 5.0, 1.0, 1.0, 0.2])


def visits(examples=40, each=3, alike=0.8, seed=0):
    """Rows [examples * each, 10] in the order of epochs, and what they are of; alike: correlation of an example's."""
    generator = torch.Generator().manual_seed(seed)
    own = torch.randn(examples, 10, generator=generator).repeat(each, 1)
    new = torch.randn(each * examples, 10, generator=generator)
    rows = (alike**0.5 * own + (1 - alike) ** 0.5 * new) * SCALES
    return rows, [f"e{number % examples}" for number in range(each * examples)]


def moments_of(rows, names, split=None):
    moments = SecondMoments(SPANS)
    for first in range(0, len(rows), split or len(rows)):
        part = slice(first, first + (split or len(rows)))
        moments.add(rows[part], names and names[part])
    return moments


def test_rows_of_different_examples_have_no_effect():
    rows, _ = visits()
    apart = moments_of(rows, [f"e{number}" for number in range(len(rows))])
    assert apart.noise() == pytest.approx(moments_of(rows, None).noise(), rel=1e-12)


@pytest.mark.parametrize("times", [2, 5])
def test_saying_everything_again_tells_nothing_more(times):
    rows, names = visits(each=1)
    again = moments_of(rows.repeat(times, 1), names * times)
    assert again.noise() == pytest.approx(moments_of(rows, names).noise(), rel=1e-6)
    assert max(moments_of(rows.repeat(times, 1), None).noise()) < 0.8 * max(again.noise())


@pytest.mark.parametrize("alike", [0.0, 0.5, 1.0])
def test_the_effect_is_that_of_the_sums_of_outer_products(alike):
    """Against the squared sizes that the random forms stand for, written out in float64."""
    rows, names = visits(examples=EXAMPLES, each=4, alike=alike)
    repeated, moments = RepeatedRows(SPANS), moments_of(rows, names)
    repeated.add(names, rows)
    for effect, span, mean in zip(repeated.effects(moments.means()), SPANS, moments.means(), strict=True):
        block = rows[:, span].double()
        outer = block[:, :, None] * block[:, None, :] - mean
        together = torch.zeros(EXAMPLES, *mean.shape).double()
        together.index_add_(0, torch.arange(len(rows)) % EXAMPLES, outer)
        assert effect == pytest.approx(float(together.square().sum() / outer.square().sum()), rel=0.15)


def test_the_noise_is_the_squared_error_of_the_mean_over_draws():
    """The share of the squared distance to a multiple of the identity that drawing other examples would change."""
    drawn = [moments_of(*visits(seed=seed)) for seed in range(300)]
    for number, _ in enumerate(SPANS):
        means = torch.stack([moments.means()[number] for moments in drawn])
        errors = (means - means.mean(0)).square().sum((1, 2)).mean()
        flat = torch.eye(means.shape[1]).double() * means.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
        share = float(errors / (means - flat).square().sum((1, 2)).mean())
        assert sum(moments.noise()[number] for moments in drawn) / 300 == pytest.approx(share, rel=0.2)


@pytest.mark.parametrize("examples", [40, 3 * EXAMPLES])
def test_it_does_not_depend_on_split_order_or_who_adds(examples):
    rows, names = visits(examples=examples)
    whole = moments_of(rows, names).noise()
    turned = torch.randperm(len(rows), generator=torch.Generator().manual_seed(1)).tolist()
    shuffled = moments_of(rows[turned], [names[at] for at in turned], split=17)
    first, second = (moments_of(rows[part], names[part]) for part in (slice(0, 55), slice(55, None)))
    first.merge(second)
    assert shuffled.noise() == pytest.approx(whole, rel=1e-5)
    assert first.noise() == pytest.approx(whole, rel=1e-5)


def test_of_many_examples_a_sample_is_kept_that_tells_the_same():
    rows, names = visits(examples=20 * EXAMPLES, alike=0.7)
    repeated = RepeatedRows(SPANS)
    repeated.add(names, rows)
    assert torch.equal(repeated._sums[:, 0], torch.full((EXAMPLES, 2, PROBES), 3.0).double())
    few, few_names = visits(examples=EXAMPLES, alike=0.7, seed=1)
    all_of_them = RepeatedRows(SPANS)
    all_of_them.add(few_names, few)
    means = moments_of(rows, names).means()
    assert repeated.effects(means) == pytest.approx(all_of_them.effects(means), rel=0.15)


def test_nothing_seen_or_nothing_varying_is_no_effect():
    assert RepeatedRows(SPANS).effects([torch.eye(6).double(), torch.eye(4).double()]) == [1.0, 1.0]
    repeated = RepeatedRows(SPANS)
    repeated.add(["a", "a"], torch.zeros(2, 10))
    assert repeated.effects([torch.zeros(6, 6).double(), torch.zeros(4, 4).double()]) == [1.0, 1.0]
