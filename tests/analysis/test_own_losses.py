"""Losses without the example itself: exact for ridge regression, their dense definition for a classifier."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.analysis.stages import stage_data, three_stages
from tests.analysis.test_gauss_newton import SPANS, examples, root_of_metric
from tests.analysis.test_influence import gradient
from trainer_attrib import Analyzer, Examples, Recorder, SketchConfig
from trainer_attrib.analysis.effects.between_snapshots import BetweenSnapshots
from trainer_attrib.analysis.own_losses import leave_one_out, self_gauss_newton
from trainer_attrib.analysis.recipes.gauss_newton import GaussNewton
from trainer_attrib.analysis.training_state import standing
from trainer_attrib.errors import MissingDataError
from trainer_attrib.numerics.curvature_fit import FLATTENED, CurvatureFit
from trainer_attrib.numerics.leaving_out import LeavingOut

RATE, STEPS, DECAY = 0.05, 20, 0.02


def scores_of(found):
    return {row.example: row.score for row in found.rows}


def squared_losses(model, items):
    x, y = map(torch.stack, zip(*items, strict=True))
    return (model(x)[:, 0] - y).square() / 2


def predictions(model, items, generator):
    """Of a squared loss curvature is the outer product of the prediction's gradient."""
    del generator
    yield model(torch.stack([x for x, _ in items]))[:, 0]


def ridge(x, y, alpha):
    return torch.linalg.solve(x.T @ x + alpha * torch.eye(x.shape[1]).double(), x.T @ y)


@pytest.fixture
def regression(tmp_path):
    """A recorded linear model, and targets of which its weights are the ridge estimate with training's own penalty."""
    torch.manual_seed(0)
    model, count = nn.Linear(5, 1, bias=False).double(), 30
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE, weight_decay=DECAY)
    x = torch.randn(count, 5).double()
    with Recorder(tmp_path, stage="only", model=model, optimizer=optimizer, sketch=SketchConfig(rank=8)) as recorder:
        for step in range(STEPS):
            with recorder.batch(ids=[f"e{i}" for i in range(count)]):
                (model(x)[:, 0] - x[:, step % 5]).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    weights, movement = model.weight.detach()[0], RATE * STEPS
    alpha = count * (1 - STEPS * np.log(1 - RATE * DECAY)) / movement
    residuals = x @ torch.linalg.solve(x.T @ x, alpha * weights)
    noise = torch.randn(count).double()
    y = x @ weights + residuals + noise - x @ torch.linalg.lstsq(x, noise[:, None]).solution[:, 0]
    torch.testing.assert_close(ridge(x, y, alpha), weights)
    data = Examples([*zip(x, y, strict=True)], squared_losses, [f"e{i}" for i in range(count)], fisher=predictions)
    return Analyzer(tmp_path, model), data, (x, y, alpha)


def test_of_ridge_regression_it_is_the_loss_of_the_model_fitted_without_the_example(regression):
    analyzer, data, (x, y, alpha) = regression
    found = scores_of(analyzer.self_influence(metric="leave_one_out", data={"only": data}))
    for i in range(len(x)):
        others = torch.arange(len(x)) != i
        without = ridge(x[others], y[others], alpha)
        assert found[f"e{i}"] == pytest.approx(float((x[i] @ without - y[i]).square() / 2), rel=1e-9)


def test_of_ridge_regression_residuals_grow_by_leverage(regression):
    analyzer, data, (x, y, alpha) = regression
    residuals = y - x @ ridge(x, y, alpha)
    leverage = (x * torch.linalg.solve(x.T @ x + alpha * torch.eye(5).double(), x.T).T).sum(1)
    left_out = scores_of(analyzer.self_influence(metric="leave_one_out", data={"only": data}))
    lowered = analyzer.self_influence(metric="gauss_newton", data={"only": data})
    for i in range(len(x)):
        residual, h = float(residuals[i]), float(leverage[i])
        assert left_out[f"e{i}"] == pytest.approx((residual / (1 - h)) ** 2 / 2, rel=1e-9)
        assert scores_of(lowered)[f"e{i}"] == pytest.approx(residual**2 * h, rel=1e-9)
    losses = {row.example: row.loss for row in lowered.rows}
    assert losses == pytest.approx({f"e{i}": float(residuals[i] ** 2 / 2) for i in range(len(x))})


def parts(model, x, y):
    """Loss, gradient and the rows of its curvature, of one example."""
    loss, logits = F.cross_entropy(model(x[None]), y[None]), model(x[None]).log_softmax(1)[0]
    weights = logits.detach().exp().sqrt()
    own = torch.stack([gradient(model, model(x[None]).log_softmax(1)[0, c]) * weights[c] for c in range(3)])
    return float(loss.detach()), gradient(model, loss), own


@pytest.mark.parametrize("kind", ["momentum", "adamw"])
def test_scores_equal_their_dense_definition(tmp_path, kind):
    run = three_stages(tmp_path / "run", kind, stages=("first",))
    analyzer, (x, y) = Analyzer(run.ledger, run.model), stage_data("first")
    record, states = BetweenSnapshots(analyzer.lineage[0]), ("mid-2", "end")
    root = root_of_metric(analyzer.lineage[0], record.metric(0, 16))
    decay = float(torch.stack([-record.decay(0, 16)[f"{layer}.weight"].log() for layer in ("body", "head")]).mean())
    lowered, left_out, lost = np.zeros(24), np.zeros(24), np.zeros(24)
    for state in states:
        with standing(run.model, analyzer._view([]).inside(analyzer.lineage[0], state)):
            known = [parts(run.model, x[i], y[i]) for i in range(24)]
        curvature = sum((own * root).T @ (own * root) for _, _, own in known)
        for i, (loss, g, own) in enumerate(known):
            moves = torch.zeros(83).double()
            for span in SPANS:
                slack = 24 * (1 + decay) * torch.eye(span.stop - span.start).double()
                force, part = (g * root)[span], (own * root)[:, span]
                lowered[i] += float(force @ torch.linalg.solve(curvature[span, span] + slack, force))
                moves[span] = torch.linalg.solve(curvature[span, span] - part.T @ part + slack, force)
            lost[i] += loss
            left_out[i] += loss + float((g * root) @ moves + (own * root @ moves).square().sum() / 2)
    settings, data = GaussNewton(snapshots=states, rank=64), {"first": examples()}
    first = analyzer.self_influence(metric=self_gauss_newton(settings), data=data)
    second = analyzer.self_influence("first", leave_one_out(settings), data)
    for found, expected in ((first, lowered), (second, left_out)):
        scores = scores_of(found)
        np.testing.assert_allclose([scores[f"first/{i}"] for i in range(24)], expected / 2, rtol=1e-6)
        assert {row.visits for row in found.rows} == {2}
        losses = {row.example: row.loss for row in found.rows}
        np.testing.assert_allclose([losses[f"first/{i}"] for i in range(24)], lost / 2, rtol=1e-9)
    assert second.metric == "leave_one_out"
    assert "leave_one_out" in str(second.to_dict())
    assert any("loss" in getattr(block, "columns", ()) for block in second.blocks())
    assert "loss" in second.to_table().column_names


def test_it_is_what_the_loss_becomes_when_training_leaves_an_example_out(tmp_path):
    """Really retrained without each example, whose gradient then counts 0 in its batches."""
    from tests.analysis.stages import Classifier
    from tests.analysis.test_gauss_newton import _train_without

    run, (x, y) = three_stages(tmp_path / "run", "momentum", lr=0.05, stages=("first",)), stage_data("first")
    data = {"first": examples()}
    found = Analyzer(run.ledger, run.model).self_influence(metric="leave_one_out", data=data)
    predicted, losses, true = scores_of(found), {row.example: row.loss for row in found.rows}, []
    for left_out in range(24):
        model = Classifier().double()
        model.load_state_dict(run.initial)
        _train_without(model, left_out)
        true.append(float(F.cross_entropy(model(x[left_out : left_out + 1]), y[left_out : left_out + 1]).detach()))
    off, off_plain = (np.abs([by[f"first/{i}"] - true[i] for i in range(24)]).mean() for by in (predicted, losses))
    assert off < 0.6 * off_plain


def test_scores_do_not_depend_on_batches_and_examples_outside_of_the_fit_have_scores_too(tmp_path):
    run = three_stages(tmp_path / "run", stages=("first",))
    analyzer, metric = Analyzer(run.ledger, run.model), leave_one_out(GaussNewton(snapshots=("end",), sample=10))
    one, other = (
        scores_of(analyzer.self_influence(metric=metric, data={"first": examples(batch_size=size)})) for size in (24, 7)
    )
    assert len(one) == 24
    assert one == pytest.approx(other, rel=1e-6)


def test_predictions_are_drawn_once(tmp_path):
    """What is taken out of the curvature is what is in it."""
    run, drawn = three_stages(tmp_path / "run", stages=("first",)), []

    def one_of_them(model, items, generator):
        logits = model(torch.stack([x for x, _ in items])).log_softmax(1)
        drawn.append(torch.multinomial(logits.detach().exp(), 1, generator=generator))
        yield -logits.gather(1, drawn[-1])[:, 0]

    data = dataclasses.replace(examples(batch_size=6), fisher=one_of_them)
    found = Analyzer(run.ledger, run.model).self_influence(metric="leave_one_out", data={"first": data})
    assert all(np.isfinite(row.score) and row.score >= row.loss for row in found.rows)
    basis, fit, again = drawn[:4], drawn[4:8], drawn[8:]
    assert len(again) == 4
    assert all(torch.equal(a, b) for a, b in zip(fit, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(basis, fit, strict=True))


def test_wrong_labels_come_first(tmp_path):
    run, (x, y) = three_stages(tmp_path / "run", "momentum", lr=0.05, stages=("first",)), stage_data("first")
    with torch.no_grad():
        sure, y = run.model(x).softmax(1).max(1)
    wrong = sure.topk(2).indices.tolist()
    y[wrong] = (y[wrong] + 1) % 3
    data = Examples.of_classes(x, y, ids=[f"first/{i}" for i in range(24)])
    found = Analyzer(run.ledger, run.model).self_influence(metric="leave_one_out", data={"first": data})
    assert {row.example for row in found.top(2)} == {f"first/{i}" for i in wrong}
    assert found.rows[0].rank == 1
    assert any("one forward pass" in caveat for caveat in found.caveats)


def test_the_examples_must_be_given(tmp_path):
    run = three_stages(tmp_path / "run", stages=("first",))
    with pytest.raises(MissingDataError, match="'leave_one_out' needs the examples of stage 'first'"):
        Analyzer(run.ledger, run.model).self_influence(metric="leave_one_out")


@pytest.mark.parametrize("room", [1 << 20, 10])
def test_own_rows_are_taken_out_block_by_block(room):
    generator = torch.Generator().manual_seed(0)
    own, forces = torch.randn(9, 2, 7, generator=generator).double(), torch.randn(9, 7, generator=generator).double()
    spans = [slice(0, 4), slice(4, 7)]
    fit = CurvatureFit(spans, own, room=room)
    fit.add(own.flatten(0, 1))
    others = LeavingOut(fit, 9, 2.0)
    found, nothing = others.respond_without(forces, own), others.respond_without(forces, torch.zeros_like(own))
    torch.testing.assert_close(nothing, fit.respond(forces, 9, 2.0))
    torch.testing.assert_close(others.respond(forces), nothing)
    for i in range(9):
        rest = own[torch.arange(9) != i].flatten(0, 1)
        for span in spans:
            curvature = rest[:, span].T @ rest[:, span] / 9
            if not fit.whole:
                curvature = curvature.diagonal().diag()
            curvature = curvature + (2.0 if fit.whole else FLATTENED * 2.0) * torch.eye(len(curvature)).double()
            torch.testing.assert_close(found[i, span], torch.linalg.solve(curvature, forces[i, span]))
