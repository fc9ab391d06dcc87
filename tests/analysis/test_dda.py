from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.analysis.stages import margins, three_stages
from tests.analysis.test_influence import FULL, RAW, dense
from tests.analysis.test_passes import examples, ordered
from trainer_attrib import Analyzer
from trainer_attrib.analysis.passes import Snapshots
from trainer_attrib.analysis.recipes.dda import Dda
from trainer_attrib.analysis.recipes.directional import Directional
from trainer_attrib.analysis.recipes.gauss_newton import GaussNewton
from trainer_attrib.analysis.recipes.loss_difference import ContrastiveLossDifference
from trainer_attrib.analysis.recipes.products import GradCos, GradDot
from trainer_attrib.analysis.recipes.trackstar import TrackStar
from trainer_attrib.analysis.recipes.unrolled import Unrolled
from trainer_attrib.analysis.retrieval.where import Where
from trainer_attrib.errors import ConfigurationError

STATES = Snapshots(("start", "mid-1", "end"))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return three_stages(tmp_path_factory.mktemp("run"), "sgd", sketch=RAW, stages=("first",))


def at(run, analyzer, behavior, state):
    """Dense products at a state, standardized over the examples."""
    stage, kept = analyzer.lineage[0], {n: v.clone() for n, v in run.model.state_dict().items()}
    try:
        run.model.load_state_dict(stage.snapshot(state))
        queries, rows = dense(run, behavior)
    finally:
        run.model.load_state_dict(kept)
    products = -(queries @ rows.T).numpy()
    cosines = -(F.normalize(queries, dim=1) @ F.normalize(rows, dim=1).T).numpy()
    return [(x - x.mean(1, keepdims=True)) / x.std(1, keepdims=True) for x in (products, cosines)]


@pytest.mark.parametrize("beta", [0.0, 0.25, 1.0])
@pytest.mark.parametrize(("number", "recipe"), enumerate((GradDot(), GradCos())))
def test_over_passes_it_is_its_dense_definition(run, beta, number, recipe):
    behavior, analyzer = margins(), Analyzer(run.ledger, run.model)
    found = analyzer.influence([behavior], recipe=Dda(recipe, beta), data={"first": examples(run)}, source=STATES)
    base, mid, end = (at(run, analyzer, behavior, state)[number] for state in STATES.names)
    np.testing.assert_allclose(ordered(found), (mid + end) / 2 - beta * base, rtol=1e-3, atol=2e-4)
    assert any("denoised: mean over mid-1, end" in caveat for caveat in found.caveats)
    assert any(f"debiased: {beta:g} times" in caveat for caveat in found.caveats) == bool(beta)
    assert any("calibrate" in caveat for caveat in found.caveats) == bool(beta)


def test_it_composes_with_recipes_that_differentiate_at_states(run):
    behavior, analyzer = margins(), Analyzer(run.ledger, run.model)
    recipe = Dda(Directional(), 0.5, {"mid-1": 1.0, "end": 3.0})
    found = analyzer.influence([behavior], recipe=recipe, data={"first": examples(run)})
    base, mid, end = (at(run, analyzer, behavior, state)[0] for state in STATES.names)
    np.testing.assert_allclose(ordered(found), (mid + 3 * end) / 4 - 0.5 * base, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "recipe", [ContrastiveLossDifference(change=0.1), GaussNewton(), TrackStar(), TrackStar(mixing=0.5)]
)
def test_it_composes_with_other_recipes(run, recipe):
    analyzer, source = Analyzer(run.ledger, run.model), STATES if hasattr(recipe, "prepare") else "training"
    alone = Dda(recipe, 0.0, {"end": 1.0})
    data = {"first": examples(run)}
    found = analyzer.influence([margins()], recipe=alone, data=data, source=source)
    before = {n: p.clone() for n, p in run.model.state_dict().items()}
    other, where = _at_end(recipe)
    end = ordered(analyzer.influence([margins()], recipe=other, data=data, source=where))
    expected = (end - end.mean(1, keepdims=True)) / end.std(1, keepdims=True)
    np.testing.assert_allclose(ordered(found), expected, rtol=1e-3, atol=1e-3)
    assert all(torch.equal(before[n], p) for n, p in run.model.state_dict().items())


def _at_end(recipe):
    if isinstance(recipe, GaussNewton):
        return GaussNewton(snapshots=("end",)), "training"
    return recipe, Snapshots(("end",)) if hasattr(recipe, "prepare") else "training"


def test_signed_weights_are_used_as_they_are(run):
    behavior, analyzer = margins(), Analyzer(run.ledger, run.model)
    recipe = Dda(GradCos(), 0.0, {"start": -0.5, "mid-1": 0.25, "end": 2.0})
    found = analyzer.influence([behavior], recipe=recipe, data={"first": examples(run)}, source=STATES)
    base, mid, end = (at(run, analyzer, behavior, state)[1] for state in STATES.names)
    np.testing.assert_allclose(ordered(found), -0.5 * base + 0.25 * mid + 2 * end, rtol=1e-3, atol=1e-3)
    assert any("-0.50 start" in caveat for caveat in found.caveats)


def test_rows_of_training_stand_for_every_state(tmp_path):
    """A learning rate of 0: all rows of an example are alike, so that every state gives the same scores."""
    run, behavior = three_stages(tmp_path / "run", "sgd", lr=0.0, sketch=RAW, stages=("first",)), margins()
    analyzer = Analyzer(run.ledger, run.model)
    found = analyzer.influence([behavior], recipe=Dda(GradCos(), 0.25))
    np.testing.assert_allclose(ordered(found), 0.75 * at(run, analyzer, behavior, "end")[1], rtol=1e-3, atol=1e-3)


def test_rows_of_training_with_second_moments(tmp_path):
    run = three_stages(tmp_path / "run", "adamw", sketch=FULL, stages=("first",))
    found = Analyzer(run.ledger, run.model).influence([margins()], recipe="dda")
    assert found.recipe == "dda"
    assert found.scores.shape == (7, 24)
    assert np.isfinite(found.scores).all()


def test_conditions_on_rows_hold_within_every_state(run):
    analyzer = Analyzer(run.ledger, run.model)
    few = Where(ids=[f"first/{i}" for i in range(9)])
    found = analyzer.influence([margins()], recipe=Dda(beta=0.0), where=few, keep=3)
    assert sorted(found.examples.ids) == sorted(few.ids)
    assert found.scores.shape == (7, 6)
    with pytest.raises(ConfigurationError, match="scores the given examples"):
        analyzer.influence([margins()], recipe=Dda(Directional()), where=few, data={"first": examples(run)})


def test_what_cannot_be_corrected_is_refused(run):
    analyzer, data = Analyzer(run.ledger, run.model), {"first": examples(run)}
    with pytest.raises(ConfigurationError, match="scores whole trainings"):
        analyzer.influence([margins()], recipe=Dda(Unrolled()))
    with pytest.raises(ConfigurationError, match=r"no rows at \['start'\].*at \['end'\]"):
        analyzer.influence([margins()], recipe="dda", data=data, source="snapshot")
    with pytest.raises(ConfigurationError, match="no rows at \\['never'\\]"):
        analyzer.influence([margins()], recipe=Dda(beta=0.0, weights={"never": 1.0}))
    with pytest.raises(ConfigurationError, match="the start has one, or beta, not both"):
        Dda(beta=1.0, weights={"start": 1.0, "end": 1.0})
    with pytest.raises(ConfigurationError, match="weight that is not 0"):
        Dda(weights={"end": 0.0})
