from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.analysis.adapted import adapted, llama, losses, record, rows_of
from tests.analysis.stages import margins, three_stages
from trainer_attrib import Analyzer, Behavior, Examples
from trainer_attrib.analysis.effects.propagate import Propagate
from trainer_attrib.analysis.recipes.directional import Directional
from trainer_attrib.analysis.recipes.loss_difference import ContrastiveLossDifference
from trainer_attrib.analysis.text import TextPair, text_losses
from trainer_attrib.analysis.training_state import TrainingState, standing
from trainer_attrib.errors import ConfigurationError, MissingDataError, NotComparableError, StageNotFoundError
from trainer_attrib.tap.names import parameters_by_name

LAST = "third"


@pytest.fixture(scope="module")
def adamw(tmp_path_factory):
    return three_stages(tmp_path_factory.mktemp("adamw"), "adamw")


@pytest.fixture(scope="module")
def momentum(tmp_path_factory):
    return three_stages(tmp_path_factory.mktemp("momentum"), "momentum")


def classes(run, stage=LAST, rows=slice(None), batch_size=64):
    x, y = run.data[stage]
    at = list(range(len(x)))[rows]
    return Examples.of_classes(x[at], y[at], ids=[f"{stage}/{i}" for i in at], batch_size=batch_size)


def scored(run, behavior, recipe="directional", examples=None, stage=LAST):
    data = {stage: examples or classes(run, stage)}
    return Analyzer(run.ledger, run.model).influence([behavior], [stage], recipe, data=data)


def dense(model, behavior, data, reach):
    """-q^T P g with every gradient formed, at the model's weights."""
    places = parameters_by_name(model)

    def gradient(value):
        return dict(zip(places, torch.autograd.grad(value, list(places.values())), strict=True))

    queries = [gradient(behavior.value_of(model, q)) for q in range(len(behavior))]
    examples = [gradient(F.cross_entropy(model(x[None]), y[None])) for x, y in zip(*data, strict=True)]
    return np.array([[-sum(float((q[n] * reach(n) * g[n]).sum()) for n in places) for g in examples] for q in queries])


def reach_of(stage, snapshot="end", rate=0.02):
    moments = stage.moments(snapshot)
    return lambda name: rate / (moments[name].sqrt() + 1e-8)


def test_scores_equal_dense_gradients_in_the_optimizers_metric(adamw):
    stage = Analyzer(adamw.ledger, adamw.model).lineage[-1]
    expected = dense(adamw.model, margins(), adamw.data[LAST], reach_of(stage))
    np.testing.assert_allclose(scored(adamw, margins()).scores, expected.astype(np.float32), rtol=1e-6)


def test_scores_of_sgd_count_what_momentum_adds(momentum):
    expected = dense(momentum.model, margins(), momentum.data[LAST], lambda _: 0.02 / (1 - 0.9))
    np.testing.assert_allclose(scored(momentum, margins()).scores, expected.astype(np.float32), rtol=1e-6)


def test_several_states_each_stand_for_the_steps_nearest_to_them(adamw):
    stage = Analyzer(adamw.ledger, adamw.model).lineage[-1]
    at = {entry["name"]: entry["step"] for entry in stage.meta["snapshots"]}
    names, steps, expected = ("start", "mid-2", "end"), np.arange(16) + 0.5, 0
    nearest = np.abs(np.array([at[name] for name in names])[:, None] - steps).argmin(0)
    for number, name in enumerate(names):
        moments = {"start": "mid-1"}.get(name, name)  # a fresh optimizer has none yet
        with standing(adamw.model, TrainingState(stage.snapshot(name))):
            found = dense(adamw.model, margins(), adamw.data[LAST], reach_of(stage, moments))
        expected = expected + found * (nearest == number).mean()
    scores = scored(adamw, margins(), Directional(("end", "start", "mid-2"))).scores
    np.testing.assert_allclose(scores, expected.astype(np.float32), rtol=1e-6, atol=1e-8)
    everywhere = scored(adamw, margins(), Directional(())).scores
    named = scored(adamw, margins(), Directional(tuple(at))).scores
    np.testing.assert_array_equal(everywhere, named)


def test_an_earlier_stage_is_scored_at_its_own_end(adamw):
    stage = Analyzer(adamw.ledger, adamw.model).lineage[0]
    with standing(adamw.model, TrainingState(stage.snapshot("end"))):
        expected = dense(adamw.model, margins(), adamw.data["first"], reach_of(stage))
    scores = scored(adamw, margins(), stage="first").scores
    np.testing.assert_allclose(scores, expected.astype(np.float32), rtol=1e-6)


def test_a_step_on_an_example_changes_the_behavior_by_its_score(momentum):
    """Finite differences of really taking a small step, of the score's own rate, on one example."""
    behavior, size = margins(count=3), 1e-5
    scores, before = scored(momentum, behavior).scores, behavior.values(momentum.model)
    for example, (x, y) in enumerate(zip(*(column[:6] for column in momentum.data[LAST]), strict=True)):
        stepped = copy.deepcopy(momentum.model)
        F.cross_entropy(stepped(x[None]), y[None]).backward()
        with torch.no_grad():
            for parameter in stepped.parameters():
                parameter -= size * 0.2 * parameter.grad
        change = (behavior.values(stepped) - before).numpy() / size
        np.testing.assert_allclose(scores[:, example], change, rtol=2e-3, atol=1e-5)


@pytest.mark.parametrize("recipe", ["directional", "cea"])
def test_scores_do_not_depend_on_batches_or_order(adamw, recipe):
    whole = scored(adamw, margins(count=2), recipe).scores
    single = scored(adamw, margins(count=2), recipe, classes(adamw, batch_size=5)).scores
    np.testing.assert_allclose(single, whole, rtol=1e-6, atol=1e-9)
    turned = scored(adamw, margins(count=2), recipe, classes(adamw, rows=slice(None, None, -1))).scores
    np.testing.assert_allclose(turned[:, ::-1], whole, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("recipe", ["directional", "cea"])
def test_model_and_random_states_are_left_as_they_were(adamw, recipe):
    adamw.model.train()
    gradients = [None if p.grad is None else p.grad.clone() for p in adamw.model.parameters()]
    before, random = copy.deepcopy(adamw.model.state_dict()), torch.get_rng_state()
    scored(adamw, margins(count=2), recipe, stage="first")
    assert all(torch.equal(before[name], value) for name, value in adamw.model.state_dict().items())
    assert torch.equal(random, torch.get_rng_state())
    assert adamw.model.training
    for parameter, gradient in zip(adamw.model.parameters(), gradients, strict=True):
        assert type(parameter) is torch.nn.Parameter
        assert torch.equal(parameter.grad, gradient)


def test_small_moves_of_cea_are_directional(adamw):
    directional = scored(adamw, margins()).scores
    errors = [
        np.abs(scored(adamw, margins(), ContrastiveLossDifference(change)).scores - directional).max()
        for change in (0.1, 0.01)
    ]
    assert errors[1] < 0.02 * errors[0]  # the error is of second order
    assert errors[1] < 1e-4 * np.abs(directional).max()


def test_cea_moves_as_far_as_the_behavior_should_change(adamw):
    analyzer = Analyzer(adamw.ledger, adamw.model)
    behavior, recipe = margins(count=1), ContrastiveLossDifference(change=2.0)
    found = analyzer.influence([behavior], [LAST], recipe, data={LAST: classes(adamw)})
    stage = analyzer.lineage[-1]
    places, reach = parameters_by_name(adamw.model), reach_of(stage)
    gradient = torch.autograd.grad(behavior.value_of(adamw.model, 0), list(places.values()))
    way = {n: reach(n) * g for n, g in zip(places, gradient, strict=True)}

    def at(step):
        with standing(adamw.model, TrainingState({n: p.detach() + step * way[n] for n, p in places.items()})):
            own = F.cross_entropy(adamw.model(adamw.data[LAST][0]), adamw.data[LAST][1], reduction="none")
            return float(behavior.values(adamw.model)), own.detach().numpy()

    steps = torch.linspace(0.01, 60, 600).tolist()
    changes = [at(s)[0] - at(-s)[0] for s in steps]
    fits = [s for s, change in zip(steps, changes, strict=True) if 1.8 <= change <= 2.2]
    candidates = np.array([(at(-s)[1] - at(s)[1]) / (2 * s) for s in fits])
    assert np.abs(candidates - found.scores[0]).max(1).min() < 0.01 * np.abs(found.scores).max()
    assert not any("moves change the behavior" in caveat for caveat in found.caveats)


def test_a_change_out_of_reach_is_said(adamw):
    bounded = Behavior("bounded", [torch.ones(6).double()], lambda m, items: m(torch.stack(items))[:, 0].tanh())
    found = scored(adamw, bounded, ContrastiveLossDifference(change=5.0))
    assert any("1 moves change the behavior by something else than 5" in caveat for caveat in found.caveats)


def test_a_loss_without_forward_derivative_is_scored_by_differences(adamw):
    class Opaque(torch.autograd.Function):
        @staticmethod
        def forward(ctx, value):
            return value.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient

    plain = classes(adamw)
    opaque = Examples(plain.dataset, lambda m, items: Opaque.apply(plain.loss(m, items)), plain.ids)
    found = scored(adamw, margins(), examples=opaque)
    np.testing.assert_allclose(found.scores, scored(adamw, margins()).scores, rtol=1e-3, atol=1e-5)
    assert any("central differences" in caveat for caveat in found.caveats)


@pytest.mark.parametrize("recipe", ["directional", "cea"])
def test_what_cannot_be_answered_is_refused(adamw, recipe):
    analyzer = Analyzer(adamw.ledger, adamw.model)
    with pytest.raises(MissingDataError, match=f"Recipe '{recipe}' needs the examples of stage 'third'"):
        analyzer.influence([margins()], [LAST], recipe)
    with pytest.raises(ConfigurationError, match="carried back"):
        analyzer.influence(
            [margins()], [LAST], recipe, data={LAST: classes(adamw)}, carry=Propagate(), programs=adamw.loops
        )
    with pytest.raises(StageNotFoundError, match="no snapshot 'middle'"):
        scored(adamw, margins(), Directional(("middle",)))


def texts(stage="tuned", batch_size=3):
    items = [TextPair(tuple(row["input_ids"]), tuple(row["input_ids"])) for row in rows_of(stage)]
    lengths = [len(item.tokens) for item in items]
    return Examples(items, text_losses, [row["id"] for row in rows_of(stage)], lengths=lengths, batch_size=batch_size)


def test_of_an_adapted_model_only_what_was_trained_counts(tmp_path):
    model = record(adapted(llama().double()), tmp_path, "tuned")
    analyzer, behavior, examples = Analyzer(tmp_path / "ledger", model), losses(), texts()
    found = analyzer.influence([behavior], recipe="directional", data={"tuned": examples})
    places = {n: p for n, p in parameters_by_name(model).items() if p.requires_grad}
    moments, rates = analyzer.lineage[0].moments("end"), analyzer.lineage[0].steps()["learning_rate"].to_pylist()
    assert set(places) == set(moments)
    model.eval()
    rate, expected = np.mean([r[0] for r in rates]), []
    for query in range(3):
        gradient = torch.autograd.grad(behavior.value_of(model, query), list(places.values()))
        way = [rate * g / (moments[n].sqrt() + 1e-8) for n, g in zip(places, gradient, strict=True)]
        way = [torch.where(moments[n] > 0, w, 0.0) for n, w in zip(places, way, strict=True)]
        own = [torch.autograd.grad(text_losses(model, [i]).sum(), list(places.values())) for i in examples.dataset]
        expected.append([-sum(float((a * b).sum()) for a, b in zip(way, grads, strict=True)) for grads in own])
    np.testing.assert_allclose(found.scores, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())
    merged = model.merge_and_unload()
    with pytest.raises(NotComparableError, match="none of the"):
        Analyzer(tmp_path / "ledger", merged).influence([behavior], recipe="directional", data={"tuned": examples})
