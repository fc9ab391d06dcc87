from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
import torch
import torch.nn.functional as F

from tests.analysis.stages import Classifier, margins, three_stages
from trainer_attrib import Analyzer, Behavior, SketchConfig
from trainer_attrib.analysis.recipes.trackstar import TrackStar
from trainer_attrib.errors import AnalysisError, ConfigurationError, ModelMismatchError, StageNotFoundError
from trainer_attrib.numerics.second_moment import factor, inverse_root, lifted

FULL = SketchConfig(rank=64, dtype="float32")  # at least as large as every side: nothing is projected away
SPANS = (slice(0, 56), slice(56, 83))  # of the two layers, weights and biases
RAW = SketchConfig(rank=64, dtype="float32", correction="none")


def gradient(model, value, bias_last=True):
    """Dense gradient in the order of a row: each weight with its bias as the last column."""
    grads = torch.autograd.grad(value, list(model.parameters()))
    return torch.cat([torch.cat([w, b[:, None]], 1).flatten() for w, b in zip(grads[::2], grads[1::2], strict=True)])


def own_losses(run, stage):
    x, y = run.data[stage]
    return [F.cross_entropy(run.model(x[i : i + 1]), y[i : i + 1]) for i in range(len(x))]


def dense(run, behavior, stage="first"):
    examples = torch.stack([gradient(run.model, loss) for loss in own_losses(run, stage)])
    queries = torch.stack([gradient(run.model, behavior.value_of(run.model, q)) for q in range(len(behavior))])
    return queries, examples


def ordered(influence, stage="first"):
    where = {str(example): n for n, example in enumerate(influence.examples.ids)}
    return influence.scores[:, [where[f"{stage}/{i}"] for i in range(24)]]


@pytest.mark.parametrize("recipe", ["grad_cos", "grad_dot"])
def test_scores_equal_their_dense_definition_without_projection(tmp_path, recipe):
    """A learning rate of 0 keeps the weights, so that every row and the query see the same model."""
    run, behavior = three_stages(tmp_path / "run", "sgd", lr=0.0, sketch=RAW, stages=("first",)), margins()
    found = ordered(Analyzer(run.ledger, run.model).influence([behavior], recipe=recipe))
    queries, examples = dense(run, behavior)
    if recipe == "grad_cos":
        queries, examples = F.normalize(queries, dim=1), F.normalize(examples, dim=1)
    np.testing.assert_allclose(found, -(queries @ examples.T).numpy(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("recipe", ["fisher", "trackstar"])
def test_scores_with_curvature_equal_their_dense_definition_without_projection(tmp_path, recipe):
    run, behavior = three_stages(tmp_path / "run", "sgd", lr=0.0, sketch=RAW, stages=("first",)), margins()
    chosen = {"fisher": "fisher", "trackstar": TrackStar(mixing=0.3)}[recipe]
    found = ordered(Analyzer(run.ledger, run.model).influence([behavior], recipe=chosen))
    queries, examples = dense(run, behavior)
    expected, blocks = 0, []
    for span in SPANS:
        q, g = queries[:, span], examples[:, span]
        moment = g.T @ g / len(g)
        if recipe == "fisher":
            slack = 0.1 * moment.diagonal().mean() * torch.eye(len(moment)).double()
            expected = expected - q @ torch.linalg.solve(moment + slack, g.T)
        else:
            unit = F.normalize(queries, dim=1)[:, span]
            blocks.append((shared(unit), shrunk_moment(g)))  # of which four equal visits tell as much as one
    if blocks:
        asked, trained = (sum(block.trace() for block in side) for side in zip(*blocks, strict=True))
        whitened = []
        for (a, t), span in zip(blocks, SPANS, strict=True):
            root = inverse_root_of(0.3 * a / asked + 0.7 * t / trained)
            whitened.append((queries[:, span] @ root, examples[:, span] @ root))
        q, g = (F.normalize(torch.cat(side, 1), dim=1) for side in zip(*whitened, strict=True))
        expected = -q @ g.T
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


def shared(rows):
    """Mean outer product over pairs of different rows, its negative part left out."""
    pairs = [torch.outer(a, b) for i, a in enumerate(rows) for j, b in enumerate(rows) if i != j]
    values, vectors = torch.linalg.eigh(torch.stack(pairs).mean(0))
    return vectors @ torch.diag(values.clamp_min(0)) @ vectors.T


def shrunk_moment(rows):
    """Second moment, shrunk towards a multiple of the identity by Ledoit and Wolf's share."""
    outer = torch.stack([torch.outer(row, row) for row in rows])
    moment = outer.mean(0)
    flat = moment.diagonal().mean() * torch.eye(len(moment)).double()
    error = ((outer - moment) ** 2).sum((1, 2)).sum() / len(rows) / (len(rows) - 1)
    share = min(1.0, float(error / ((moment - flat) ** 2).sum()))
    return (1 - share) * moment + share * flat


def inverse_root_of(moment):
    values, vectors = torch.linalg.eigh(moment)
    return vectors @ torch.diag(values.rsqrt()) @ vectors.T


def test_tracin_adds_up_what_every_step_did_to_first_order(tmp_path, monkeypatch):
    """At constant weights, SGD moves the behavior by -lr * q . g / batch for each visit of an example."""
    run, behavior = three_stages(tmp_path / "run", "sgd", lr=0.0, sketch=RAW, stages=("first",)), margins()
    analyzer = Analyzer(run.ledger, run.model)
    stage = analyzer.lineage[0]
    rated = with_rates(stage.steps(), 0.5)
    monkeypatch.setattr(stage, "steps", rated.select)
    found = ordered(analyzer.influence([behavior], recipe="tracin"))
    queries, examples = dense(run, behavior)
    np.testing.assert_allclose(found, -(4 * 0.5 / 6 * queries @ examples.T).numpy(), rtol=1e-4, atol=1e-6)


def with_rates(steps, rate):
    at = steps.column_names.index("learning_rate")
    return steps.set_column(at, "learning_rate", pa.array([[rate]] * steps.num_rows))


def test_corrected_scores_equal_their_dense_definition(tmp_path):
    run, behavior = three_stages(tmp_path / "run", "adamw", lr=0.0, sketch=FULL, stages=("first",)), margins()
    analyzer = Analyzer(run.ledger, run.model)
    found = ordered(analyzer.influence([behavior], recipe="grad_dot"))
    stage = analyzer.lineage[0]
    versions = np.concatenate([b.table["version"].to_numpy() for b in stage.rows()])
    counts = {int(v): int((versions == v).sum()) for v in np.unique(versions)}
    assert counts == {0: 24, 1: 48, 2: 24}  # batches of 6: steps 1-4 raw, 5-12 version 1, 13-16 version 2
    queries, examples = dense(run, behavior)
    expected = 0
    for version in (1, 2):
        factors = stage.factors(version)
        scale = torch.cat([torch.outer(*inverse_root(*factors[w])).flatten() for w in ("body.weight", "head.weight")])
        expected = expected + counts[version] / 72 * -((queries * scale) @ (examples * scale).T)
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


def test_factors_are_those_of_the_optimizer_s_second_moments(tmp_path):
    """At a learning rate of 0 every epoch sees the same gradients, so the second moment is known in closed form."""
    run = three_stages(tmp_path / "run", "adamw", lr=0.0, sketch=FULL, stages=("first",))
    stage = Analyzer(run.ledger, run.model).lineage[0]
    x, y = run.data["first"]
    moment, beta2 = 0.0, 0.999
    for step in range(4):
        loss = F.cross_entropy(run.model(x[6 * step : 6 * step + 6]), y[6 * step : 6 * step + 6])
        grads = torch.autograd.grad(loss, [run.model.body.weight, run.model.body.bias])
        moment = beta2 * moment + (1 - beta2) * torch.cat([grads[0], grads[1][:, None]], 1) ** 2
    rows, columns = lifted(*factor(moment / (1 - beta2**4)), floor=1 / 4)
    found_rows, found_columns = stage.factors(1)["body.weight"]
    torch.testing.assert_close(found_rows, rows)
    torch.testing.assert_close(found_columns, columns)


def test_a_positive_score_means_that_training_on_the_example_increases_the_behavior(tmp_path):
    run, behavior = three_stages(tmp_path / "run", "sgd", lr=0.0, sketch=RAW, stages=("first",)), margins(count=3)
    scores = ordered(Analyzer(run.ledger, run.model).influence([behavior], recipe="grad_dot"))
    before, lr = behavior.values(run.model), 1e-6
    for example, loss in list(enumerate(own_losses(run, "first")))[:5]:
        grads = torch.autograd.grad(loss, list(run.model.parameters()))
        stepped = Classifier().double()
        with torch.no_grad():
            for new, old, grad in zip(stepped.parameters(), run.model.parameters(), grads, strict=True):
                new.copy_(old - lr * grad)
        change = (behavior.values(stepped) - before) / lr
        np.testing.assert_allclose(scores[:, example], change.numpy(), rtol=1e-3, atol=1e-4)


def test_an_example_promotes_its_own_prediction_most(tmp_path):
    run = three_stages(tmp_path / "run")
    x, y = run.data["third"]
    behavior = Behavior.margin("own", x[:6], y[:6])
    top = Analyzer(run.ledger, run.model).influence([behavior], stages=["third"]).top(3).to_pylist()
    found = sum(any(r["example"] == f"third/{q}" for r in top[3 * q : 3 * q + 3]) for q in range(6))
    assert found >= 5


def test_raw_rows_are_never_mixed_into_a_dot_product(tmp_path):
    run = three_stages(tmp_path / "run", stages=("first",))
    analyzer = Analyzer(run.ledger, run.model)
    dot = analyzer.influence([margins()], recipe="grad_dot")
    assert any("24 rows left out: raw rows" in caveat for caveat in dot.caveats)
    cosine = analyzer.influence([margins()], recipe="grad_cos")
    assert not any("left out" in caveat for caveat in cosine.caveats)
    assert any("24 rows are raw" in caveat for caveat in cosine.caveats)


def test_top_and_bottom_are_the_two_ends(tmp_path):
    run = three_stages(tmp_path / "run")
    influence = Analyzer(run.ledger, run.model).influence([margins(count=2)])
    top, bottom = influence.top(4).to_pylist(), influence.bottom(4).to_pylist()
    assert list(top[0]) == ["behavior", "query", "stage", "example", "rank", "score", "step", "source", "text"]
    assert [row["rank"] for row in top] == [1, 2, 3, 4] * 2
    assert top[0]["score"] == influence.scores[0].max()
    assert bottom[0]["score"] == influence.scores[0].min()
    assert top[0]["text"].startswith("row ")
    assert influence.to_table().num_rows == 2 * 72


def test_stages_are_chosen_by_name(tmp_path):
    run = three_stages(tmp_path / "run")
    analyzer = Analyzer(run.ledger, run.model)
    assert set(analyzer.influence([margins()], stages=["second"]).examples.stages) == {"second"}
    with pytest.raises(ConfigurationError, match="No stage 'fourth' led to this model"):
        analyzer.influence([margins()], stages=["fourth"])
    with pytest.raises(ConfigurationError, match="grad_cos"):
        analyzer.influence([margins()], recipe="magic")


def test_a_behavior_without_gradient_is_refused_for_influence_only(tmp_path):
    run = three_stages(tmp_path / "run", stages=("first",))
    rounded = Behavior("rounded", [torch.ones(6).double()], lambda m, items: m(torch.stack(items)).argmax(1).double())
    analyzer = Analyzer(run.ledger, run.model)
    assert analyzer.stage_effects([rounded], "change").rows
    with pytest.raises(AnalysisError, match="There is no gradient of behavior 'rounded'"):
        analyzer.influence([rounded])


def test_the_analyzer_accepts_only_the_recorded_model(tmp_path):
    run = three_stages(tmp_path / "run")
    with pytest.raises(ModelMismatchError, match="recorded from another model"):
        Analyzer(run.ledger, torch.nn.Linear(6, 3))
    wider = Classifier()
    wider.head = torch.nn.Linear(8, 4)
    with pytest.raises(ModelMismatchError, match=r"head\.bias: recorded"):
        Analyzer(run.ledger, wider.double())
    with pytest.raises(StageNotFoundError, match=r"No stage .* ended with these weights"):
        Analyzer(run.ledger, Classifier().double())


def test_a_model_from_the_middle_has_the_shorter_lineage(tmp_path):
    run = three_stages(tmp_path / "run")
    middle = Classifier().double()
    middle.load_state_dict(Analyzer(run.ledger, run.model).lineage[1].snapshot("end"))
    assert [stage.name for stage in Analyzer(run.ledger, middle).lineage] == ["first", "second"]
