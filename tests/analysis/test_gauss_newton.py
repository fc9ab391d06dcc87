from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.analysis.stages import Classifier, margins, stage_data, three_stages
from tests.analysis.test_influence import gradient
from trainer_attrib import Analyzer, Examples
from trainer_attrib.analysis.effects.between_snapshots import BetweenSnapshots
from trainer_attrib.analysis.recipes import gauss_newton
from trainer_attrib.analysis.recipes.gauss_newton import GaussNewton
from trainer_attrib.analysis.training_state import standing
from trainer_attrib.errors import ConfigurationError, MissingDataError
from trainer_attrib.numerics.curvature_fit import FIRST, FLATTENED, CurvatureFit, fit_whole
from trainer_attrib.numerics.second_moment import append_bias, factor, inverse_root

SPANS = (slice(0, 56), slice(56, 83))  # of the classifier's two layers, biases included


def examples(stage="first", **settings):
    x, y = stage_data(stage)
    return Examples.of_classes(x, y, ids=[f"{stage}/{i}" for i in range(len(y))], **settings)


def root_of_metric(stage, metric):
    """a b^T for both layers, flattened as a row is."""
    found = []
    shapes = {name: entry["shape"] for name, entry in stage.weights_at("end").items()}
    for layer in ("body", "head"):
        moments = [metric[f"{layer}.{part}"].expand(shapes[f"{layer}.{part}"]) ** -2 for part in ("weight", "bias")]
        a, b = inverse_root(*append_bias(*factor(moments[0]), moments[1], 1))
        found.append(torch.outer(a, b).sqrt().flatten())
    return torch.cat(found)


def curvature_of(model, x):
    """Gauss-Newton matrix of the mean cross entropy, from every class's gradient."""
    total = torch.zeros(83, 83).double()
    for i in range(len(x)):
        for label in range(3):
            value = model(x[i : i + 1]).log_softmax(1)[0, label]
            g = gradient(model, value)
            total += float(value.detach().exp()) * torch.outer(g, g) / len(x)
    return total


@pytest.mark.parametrize("kind", ["momentum", "adamw"])
def test_scores_equal_their_dense_definition(tmp_path, kind):
    run, behavior = three_stages(tmp_path / "run", kind, stages=("first",)), margins(count=3)
    analyzer, (x, y) = Analyzer(run.ledger, run.model), stage_data("first")
    stage = analyzer.lineage[0]
    found = analyzer.influence([behavior], recipe=GaussNewton(rank=64), data={"first": examples()})
    expected, states = 0, [e["name"] for e in stage.meta["snapshots"] if e["name"] != "start"]
    assert len(states) == 4
    record = BetweenSnapshots(stage)
    root = root_of_metric(stage, record.metric(0, 16))
    decay = float(torch.stack([-record.decay(0, 16)[f"{layer}.weight"].log() for layer in ("body", "head")]).mean())
    for state in states:
        with standing(run.model, analyzer._view([]).inside(stage, state)):
            queries = torch.stack([gradient(run.model, behavior.value_of(run.model, q)) for q in range(3)]) * root
            losses = [F.cross_entropy(run.model(x[i : i + 1]), y[i : i + 1]) for i in range(24)]
            rows = torch.stack([gradient(run.model, loss) for loss in losses]) * root
            curvature = root[:, None] * curvature_of(run.model, x) * root
        for span in SPANS:
            damped = curvature[span, span] + (1 + decay) * torch.eye(span.stop - span.start).double()
            expected = expected - queries[:, span] @ torch.linalg.solve(damped, rows[:, span].T) / 24 / len(states)
    np.testing.assert_allclose(found.scores, expected.numpy(), rtol=1e-5, atol=1e-9)


def test_scores_do_not_depend_on_batches_or_order_and_equal_examples_stay_two(tmp_path):
    run, behavior = three_stages(tmp_path / "run", stages=("first",)), margins(count=2)
    analyzer = Analyzer(run.ledger, run.model)
    x, y = stage_data("first")
    order = torch.tensor([5, *range(24), 5])
    data = [
        Examples.of_classes(x[rows], y[rows], ids=[f"{n}" for n in range(len(rows))], batch_size=size)
        for rows, size in ((order, 26), (order.flip(0), 7))
    ]
    one, other = (analyzer.influence([behavior], recipe=GaussNewton(), data={"first": d}).scores for d in data)
    np.testing.assert_allclose(one, other[:, ::-1], rtol=1e-6, atol=1e-12)
    assert one.shape == (2, 26)
    np.testing.assert_allclose(one[:, 0], one[:, 25], rtol=1e-6)


def test_a_score_predicts_what_leaving_the_example_out_does(tmp_path):
    """Really retrained without each example, whose gradient then counts 0 in its batches."""
    run, behavior = three_stages(tmp_path / "run", "momentum", lr=0.05, stages=("first",)), margins(count=6)
    scores = Analyzer(run.ledger, run.model).influence([behavior], recipe="gauss_newton", data={"first": examples()})
    whole, true = behavior.values(run.model), []
    for left_out in range(24):
        model = Classifier().double()
        model.load_state_dict(run.initial)
        _train_without(model, left_out)
        true.append(whole - behavior.values(model))
    true = torch.stack(true, 1).numpy()
    agreement = [np.corrcoef(a, b)[0, 1] for a, b in zip(scores.scores, true, strict=True)]
    assert min(agreement) > 0.8


def _train_without(model, left_out):
    x, y = stage_data("first")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.1)
    for step in range(16):
        rows = torch.arange(6) + 6 * (step % 4)
        optimizer.zero_grad()
        losses = F.cross_entropy(model(x[rows]), y[rows], reduction="none")
        ((rows != left_out) * losses).sum().div(6).backward()
        optimizer.step()


def test_the_model_is_left_as_it_was_without_hooks(tmp_path):
    run = three_stages(tmp_path / "run", stages=("first",))
    before = {name: value.clone() for name, value in run.model.state_dict().items()}
    state = torch.get_rng_state()
    Analyzer(run.ledger, run.model).influence([margins()], recipe="gauss_newton", data={"first": examples()})
    assert all(torch.equal(value, before[name]) for name, value in run.model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in run.model.modules())


def test_steps_are_those_recorded_and_data_is_required(tmp_path):
    run = three_stages(tmp_path / "run")
    analyzer = Analyzer(run.ledger, run.model)
    found = analyzer.influence([margins()], ["third"], "gauss_newton", data={"third": examples("third")})
    assert set(found.examples.steps) == {13, 14, 15, 16}
    with pytest.raises(MissingDataError, match=r"needs the examples of stage 'second'.*given are those of \['third'\]"):
        analyzer.influence([margins()], ["second"], "gauss_newton", data={"third": examples("third")})


def test_an_unknown_optimizer_is_damped_by_the_mean_curvature_and_that_is_said(tmp_path, monkeypatch):
    run = three_stages(tmp_path / "run", stages=("first",))
    analyzer = Analyzer(run.ledger, run.model)
    [optimizer] = analyzer.lineage[0].meta["optimizers"]
    monkeypatch.setitem(optimizer, "class", "torch.optim.rmsprop.RMSprop")
    found = analyzer.influence([margins()], recipe="gauss_newton", data={"first": examples()})
    assert any("not known here" in caveat for caveat in found.caveats)
    assert np.isfinite(found.scores).all()
    assert found.scores.any()


def test_without_a_fisher_the_empirical_one_stands_in(tmp_path):
    run = three_stages(tmp_path / "run", stages=("first",))
    data = dataclasses.replace(examples(), fisher=None)
    found = Analyzer(run.ledger, run.model).influence([margins()], recipe="gauss_newton", data={"first": data})
    other = Analyzer(run.ledger, run.model).influence([margins()], recipe="gauss_newton", data={"first": examples()})
    assert found.scores.any()
    assert not np.allclose(found.scores, other.scores)


def test_whole_blocks_are_solved_and_large_ones_by_their_diagonals():
    generator = torch.Generator().manual_seed(0)
    rows, forces = (torch.randn(n, 7, generator=generator).double() for n in (20, 3))
    spans = [slice(0, 4), slice(4, 7)]
    whole, diagonal = CurvatureFit(spans, rows), CurvatureFit(spans, rows, room=10)
    for fit in (whole, diagonal):
        fit.add(rows[:9])
        fit.add(rows[9:])
    assert whole.whole
    assert not diagonal.whole
    for span in spans:
        curvature = rows[:, span].T @ rows[:, span] / 20
        expected = torch.linalg.solve(curvature + 2 * torch.eye(len(curvature)).double(), forces[:, span].T).T
        torch.testing.assert_close(whole.respond(forces, 20, 2.0)[:, span], expected)
        expected = forces[:, span] / (curvature.diagonal() + FLATTENED * 2)
        torch.testing.assert_close(diagonal.respond(forces, 20, 2.0)[:, span], expected)
        relative = forces[:, span] / (curvature.diagonal() + 0.1 * curvature.diagonal().mean())
        torch.testing.assert_close(diagonal.respond(forces, 20, None)[:, span], relative)


@pytest.mark.parametrize("batch", [5, 80, 90])
@pytest.mark.parametrize("damping", [2.0, None])
def test_leading_columns_of_large_blocks_are_solved_as_a_whole_however_rows_are_batched(batch, damping):
    generator = torch.Generator().manual_seed(0)
    scales = torch.tensor([1.0, 3, 1, 2, 1, 5, 1]).double()
    rows, forces = (torch.randn(n, 7, generator=generator).double() * scales for n in (90, 3))
    rows[FIRST:] *= scales.flip(0).square()  # what comes later does not choose
    spans = [slice(0, 4), slice(4, 7)]
    fit = CurvatureFit(spans, rows, room=10, leading=2, flattened=0.5)
    plain = CurvatureFit(spans, rows, room=10, flattened=0.5)
    for part in rows.split(batch):
        fit.add(part)
        plain.add(part)
    expected = plain.respond(forces, 90, damping)
    for span in spans:
        columns = span.start + rows[:FIRST, span].square().sum(0).argsort()[-2:]
        curvature = rows[:, columns].T @ rows[:, columns] / 90
        slack = 0.1 * curvature.diagonal().mean() if damping is None else damping
        damped = curvature + slack * torch.eye(2).double()
        expected[:, columns] = torch.linalg.solve(damped, forces[:, columns].T).T
    torch.testing.assert_close(fit.respond(forces, 90, damping), expected)


def test_few_rows_choose_the_leading_columns_too():
    rows = torch.tensor([[3.0, 1.0, 2.0], [3.0, -1.0, 2.0]]).double()
    fit = CurvatureFit([slice(0, 3)], rows, room=10, leading=2, flattened=1.0)
    fit.add(rows)
    damped = rows[:, [0, 2]].T @ rows[:, [0, 2]] / 2 + torch.eye(2).double()
    found = fit.respond(torch.ones(1, 3).double(), 2, 1.0)
    torch.testing.assert_close(found[:, [0, 2]], torch.linalg.solve(damped, torch.ones(2, 1).double()).T)
    torch.testing.assert_close(found[:, 1], torch.tensor([0.5]).double())


def test_a_block_that_nothing_reached_answers_nothing():
    whole = CurvatureFit([slice(0, 2)], torch.zeros(1))
    for fit in (whole, CurvatureFit([slice(0, 2)], torch.zeros(1), room=0, leading=1)):
        fit.add(torch.zeros(3, 2))
        assert torch.equal(fit.respond(torch.zeros(1, 2), 5, None), torch.zeros(1, 2))


@pytest.mark.parametrize("columns", [{"ids": ["a", "a"]}, {"ids": ["a"]}, {"sources": ["x", "y", "z"]}])
def test_examples_that_cannot_be_told_apart_are_refused(columns):
    with pytest.raises(ConfigurationError, match="Examples got 2 items"):
        Examples.of_classes(torch.zeros(2, 6), [0, 1], **columns)


def test_turning_the_queries_back_gives_the_scores_of_turned_rows(tmp_path, monkeypatch):
    run, behavior = three_stages(tmp_path / "run", stages=("first",)), margins(count=3)
    analyzer, found = Analyzer(run.ledger, run.model), {}
    for longer in (0, 100):  # rows are never, always whole gradients
        monkeypatch.setattr(gauss_newton, "_LONGER", longer)
        recipe = GaussNewton(rank=5)  # of up to 9: coordinates are left out
        found[longer] = analyzer.influence([behavior], recipe=recipe, data={"first": examples()}).scores
    assert found[0].std() > 0
    np.testing.assert_allclose(found[0], found[100], rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize(("whole", "rank"), [(True, 3), (False, 5)])
def test_more_coordinates_are_kept_where_their_curvature_is_not_a_whole_matrix(tmp_path, monkeypatch, whole, rank):
    monkeypatch.setattr(gauss_newton, "_RANK_OF_WHOLE", 3)
    monkeypatch.setattr(gauss_newton, "_RANK", 5)
    monkeypatch.setattr(gauss_newton, "fit_whole", lambda sizes, bytes_each: whole)
    run, behavior = three_stages(tmp_path / "run", stages=("first",)), margins(count=2)
    analyzer = Analyzer(run.ledger, run.model)
    found = {
        r: analyzer.influence([behavior], recipe=GaussNewton(rank=r), data={"first": examples()}).scores
        for r in (None, 3, 5)
    }
    np.testing.assert_array_equal(found[None], found[rank])
    assert np.abs(found[3] - found[5]).max() > 1e-3 * np.abs(found[5]).max()


def test_what_fits_whole():
    assert fit_whole([1024] * 9, 4)
    assert not fit_whole([4096] * 9, 4)
    assert not fit_whole([1024] * 9, 4, room=1 << 20)
