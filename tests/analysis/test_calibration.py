from __future__ import annotations

import numpy as np
import pytest

from tests.analysis.stages import margins, three_stages
from trainer_attrib import Analyzer
from trainer_attrib.analysis.calibration import Canaries, judged
from trainer_attrib.analysis.influence_results import InfluenceExamples
from trainer_attrib.analysis.recipes.at_states import StateScores
from trainer_attrib.analysis.recipes.dda import Dda
from trainer_attrib.analysis.recipes.products import GradCos
from trainer_attrib.errors import ConfigurationError
from trainer_attrib.numerics.scores import standardized

STATES, QUERIES, EXAMPLES, BAD = ("start", "mid-1", "end"), 8, 200, 8


def states(signal, seed=0):
    """Scores at three states in which the responsible examples stand out by so many standard deviations; the other half
    of what all states have in common is noise."""
    random = np.random.default_rng(seed)
    ids = np.array([f"e{i}" for i in range(EXAMPLES)], dtype=object)
    responsible = [{str(i) for i in random.choice(ids, BAD, replace=False)} for _ in range(QUERIES)]
    bad = np.array([[example in some for example in ids] for some in responsible])
    common = random.normal(size=(QUERIES, EXAMPLES))
    scores = np.stack([common + 0.5 * random.normal(size=bad.shape) + s * bad for s in signal])
    same = np.array(["sft"] * EXAMPLES, dtype=object), ids, np.zeros(EXAMPLES, np.int64)
    examples = InfluenceExamples(*same, [None] * EXAMPLES, [None] * EXAMPLES)
    kinds = [str(q // 2) for q in range(QUERIES)]
    canaries = Canaries(margins(count=QUERIES), responsible, kinds)
    return StateScores(STATES, examples, np.stack([standardized(s) for s in scores])), canaries


def named(calibration):
    return {candidate.name: candidate for candidate in calibration.candidates}


def test_a_base_model_that_knows_nothing_of_the_error_is_taken_out():
    found, canaries = states((0, 1.5, 1.5))
    calibration = judged(found, canaries, "sft", GradCos())
    assert calibration.chosen.name in ("debiased, beta 1", "fitted")
    assert calibration.chosen.weights["start"] < 0
    assert named(calibration)["debiased, beta 1"].helps
    assert calibration.debias(1.0) == Dda(GradCos(), 1.0)


def test_debiasing_is_refused_where_the_base_model_knows_best():
    found, canaries = states((3, 1, 1))
    calibration = judged(found, canaries, "sft", GradCos())
    assert named(calibration)["debiased, beta 1"].hurts
    assert calibration.chosen.weights["start"] > 0
    with pytest.raises(ConfigurationError, match=r"refused: on canaries it lowers average precision by 0\.\d"):
        calibration.debias(1.0)
    with pytest.raises(ConfigurationError, match="was not tried"):
        calibration.debias(0.7)
    assert any("refused" in caveat for caveat in calibration.caveats)


def test_where_nothing_helps_it_is_denoising_alone():
    random = np.random.default_rng(1)
    found, canaries = states((0, 0, 0))
    noise = StateScores(STATES, found.examples, random.normal(size=found.scores.shape))
    calibration = judged(noise, canaries, "sft", GradCos())
    assert calibration.chosen.name == "denoised"
    assert calibration.recipe == Dda(GradCos(), 0.0, {"mid-1": 0.5, "end": 0.5})


def test_kinds_are_judged_by_what_was_fitted_on_others():
    """Each kind stands out in a state of its own: weights fitted on one are useless for the other."""
    found, _ = states((0, 0, 0))
    scores = np.random.default_rng(2).normal(size=found.scores.shape)
    bad = np.zeros((QUERIES, EXAMPLES), bool)
    bad[:, :BAD] = True
    scores[1, : QUERIES // 2] += 4 * bad[: QUERIES // 2]
    scores[2, QUERIES // 2 :] += 4 * bad[QUERIES // 2 :]
    own = StateScores(STATES, found.examples, scores)
    responsible = [{f"e{i}" for i in range(BAD)}] * QUERIES
    kinds = ["one"] * (QUERIES // 2) + ["other"] * (QUERIES // 2)
    calibration = judged(own, Canaries(margins(count=QUERIES), responsible, kinds), "sft", GradCos())
    assert named(calibration)["fitted"].gain < -0.2
    assert calibration.chosen.name == "denoised"


def test_the_whole_path_on_a_recorded_run(tmp_path):
    run = three_stages(tmp_path / "run", "adamw", stages=("first",))
    behavior, analyzer = margins(count=4), Analyzer(run.ledger, run.model)
    scores = analyzer.influence([behavior], recipe="grad_cos")
    responsible = [{str(scores.examples.ids[i]) for i in scores.order(q, 3, largest=True)} for q in range(4)]
    calibration = analyzer.calibrate(Canaries(behavior, responsible, ["a", "a", "b", "b"]))
    assert {"denoised", "end alone", "debiased, beta 0.25", "debiased, beta 1", "start alone", "fitted"} <= set(
        named(calibration)
    )
    assert named(calibration)["end alone"].precision > 0.5
    assert analyzer.influence([behavior], recipe=calibration.recipe).scores.shape == scores.scores.shape
    assert "chosen" in repr(calibration)
    assert calibration.to_dict()["kinds"] == 2
    assert any("2 kinds" in caveat for caveat in calibration.caveats)
    calibration.report(tmp_path / "calibration.html")


def test_canaries_are_checked():
    behavior = margins(count=2)
    with pytest.raises(ConfigurationError, match="1 sets of responsible"):
        Canaries(behavior, [{"a"}])
    with pytest.raises(ConfigurationError, match="All canaries are of one kind"):
        Canaries(behavior, [{"a"}, {"b"}], ["same", "same"])
    found, _ = states((0, 0, 0))
    with pytest.raises(ConfigurationError, match=r"canaries \[1\] was scored"):
        judged(found, Canaries(behavior, [{"e1"}, {"unknown"}]), "sft", GradCos())
