"""Suspects from scores, the data set without them, and what became of the error once they were left out."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.analysis.stages import margins, three_stages
from tests.report.test_page import HOSTILE
from trainer_attrib import Analyzer, Behavior, Examples
from trainer_attrib.analysis.influence_results import Influence, InfluenceExamples
from trainer_attrib.analysis.suspects import DEFAULT_RECIPE, Suspects
from trainer_attrib.analysis.verification import Outcome, Removed, Verification
from trainer_attrib.errors import ConfigurationError, MissingDataError
from trainer_attrib.numerics.outliers import robust_z


def scored(scores_QN, texts=None, stages="sft", sources=None):
    count = scores_QN.shape[1]
    ids = np.array([f"e{i}" for i in range(count)], dtype=object)
    names = np.array([stages] * count if isinstance(stages, str) else stages, dtype=object)
    texts = texts or [f"text {i}" for i in range(count)]
    examples = InfluenceExamples(names, ids, np.arange(count), sources or [None] * count, texts)
    queries = tuple(f"query {q}" for q in range(len(scores_QN)))
    return Influence(
        ("error",) * len(queries), queries, scores_QN.astype(np.float32), examples, "made up", ("a caveat",)
    )


def random_scores(count=200, queries=3, planted=(5, 40, 41), by=9.0, seed=0):
    scores = np.random.default_rng(seed).normal(size=(queries, count))
    scores[:, list(planted)] += by
    return scores * np.array([[1.0], [1000.0], [0.001]])[:queries] + np.array([[0.0], [7.0], [-3.0]])[:queries]


def test_each_query_counts_alike_and_the_cut_finds_what_was_planted():
    found = Suspects.of(scored(random_scores()))
    assert {row.example for row in found.rows} == {"e5", "e40", "e41"}
    assert [row.rank for row in found.rows] == [1, 2, 3]
    assert [row.share for row in found.rows] == pytest.approx([1.0] * 3)
    assert found.caveats[0].startswith("3 of 200 examples stand out (robust z above 4")
    scaled = random_scores()
    expected = ((scaled - scaled.mean(1, keepdims=True)) / scaled.std(1, keepdims=True)).mean(0)
    np.testing.assert_allclose(found.scores, expected, atol=1e-4)  # scores of an influence are float32
    first = found.rows[0]
    assert first.reason == (
        f"rank 1 of 200 by made up: {first.score:+.2f} standard deviations for the mean over 3 queries "
        f"(robust z {first.robust_z:.1f}); among the first 3 of 100% of them"
    )
    assert found.to_table().column_names == [
        "rank", "stage", "example", "score", "robust_z", "share", "step", "source", "text", "reason",
    ]  # fmt: skip
    assert json.loads(json.dumps(found.to_dict()))["suspects"][0]["text"] == f"text {first.example[1:]}"
    assert first.example in ("e5", "e40", "e41")
    assert "3 suspects of 200 examples" in repr(found)
    assert first.text in repr(found)


def test_the_cut_says_when_nothing_stands_out_and_when_too_much_does():
    none = Suspects.of(scored(random_scores(planted=())))
    assert len(none) == 1
    assert "no example stands out" in none.caveats[0]
    many = Suspects.of(scored(random_scores(planted=range(30), by=60.0)))
    assert len(many) == 10
    assert "30 examples stand out" in many.caveats[0]
    assert "the first 10 are listed, 5% of 200" in many.caveats[0]
    asked = Suspects.of(scored(random_scores()), k=7)
    assert len(asked) == 7
    assert "the first 7 of 200 examples, as asked" in asked.caveats[0]


def test_scores_that_are_unknown_are_left_out():
    scores = random_scores()
    scores[0, 5] = np.nan
    scores[:, 6] = np.nan
    scores[1, 7] = np.inf
    found = Suspects.of(scored(scores))
    assert {row.example for row in found.rows} == {"e5", "e40", "e41"}
    by_name = {row.example: row for row in found.rows}
    assert by_name["e5"].share == pytest.approx(2 / 3)
    assert np.isnan(found.scores[6])
    assert np.isfinite(found.scores[7])
    with pytest.raises(ConfigurationError, match="None of 4 examples has a finite score"):
        Suspects.of(scored(np.full((2, 4), np.nan)))
    with pytest.raises(ConfigurationError, match="k=200 suspects of 199 scored examples"):
        Suspects.of(scored(scores), k=200)
    ends = replace(scored(scores), places=np.zeros((3, 2), np.int64), keep=1)
    with pytest.raises(ConfigurationError, match="without `keep`"):
        Suspects.of(ends)


def test_deviations_are_robust_and_equal_scores_have_none():
    plain = np.arange(11.0)
    np.testing.assert_allclose(robust_z(plain), (plain - 5) / (1.4826 * 3))
    wild = np.concatenate([plain[:-1], [1e9]])
    np.testing.assert_allclose(robust_z(wild)[:-1], robust_z(plain)[:-1])
    mostly_equal = np.array([0.1] * 9 + [0.5])
    np.testing.assert_allclose(robust_z(mostly_equal), [0.0] * 9 + [0.4 / (1.2533 * 0.04)])
    assert robust_z(np.full(7, 0.1)).tolist() == [0.0] * 7
    assert np.isnan(robust_z(np.array([np.nan, 1.0]))[0])
    assert np.isnan(robust_z(np.array([np.nan]))).all()


def test_hostile_texts_are_shown_never_run(tmp_path):
    texts = [HOSTILE] * 200
    found = Suspects.of(scored(random_scores(), texts, sources=[HOSTILE] * 200))
    html = found.report(tmp_path / "page.html").read_text()
    assert "<script" not in html
    assert "<img" not in html
    assert "alert(1)" in html  # it is there, escaped
    assert "<script" not in found._repr_html_()
    row = Outcome("error", HOSTILE, HOSTILE, 0.0, 1.0, 1.0, 0.1, 0.9, HOSTILE)
    shown = Verification(HOSTILE, 1, 2, 0.0, (row,), (HOSTILE,))._repr_html_()
    assert "alert(1)" in shown
    assert not any(tag in shown for tag in ("<script", "<img"))
    pytest.importorskip("matplotlib").use("Agg")
    assert len(found.plot().axes) == 1


def test_rows_are_dropped_by_id_by_number_or_by_text():
    found = Suspects.of(scored(random_scores()))
    named = [{"id": f"e{i}", "text": f"other {i}"} for i in range(200)]
    assert [row["id"] for row in found.keep(named)] == [f"e{i}" for i in range(200) if i not in (5, 40, 41)]
    assert sorted(found.dropped(named)) == [5, 40, 41]
    numbered = [{"text": f"text  {i}"} for i in range(200)] + [{"text": "text 5"}]  # ids are hashes then, not numbers
    assert sorted(found.dropped(numbered)) == [5, 40, 41, 200]
    pairs = [{"prompt": "text ", "completion": str(i), "key": i} for i in range(200)]
    assert sorted(found.dropped(pairs, "key")) == [5, 40, 41]
    with pytest.raises(MissingDataError, match=r"1 of 3 suspects are not in the data set of 199 rows: \['e5'\]"):
        found.keep(named[:5] + named[6:])
    with pytest.raises(ConfigurationError, match="Column 'key' has 1 different values in 200 rows"):
        found.keep([{"key": 1}] * 200, "key")
    few = Suspects.of(scored(random_scores(count=3, planted=())), k=3)
    with pytest.raises(ConfigurationError, match="nothing would be left"):
        few.keep([{"id": f"e{i}"} for i in range(3)])


def test_suspects_of_several_stages_are_taken_out_of_one_data_set():
    stages = ["a"] * 100 + ["b"] * 100
    found = Suspects.of(scored(random_scores(planted=(5, 140)), stages=stages))
    rows = [{"id": f"e{i}"} for i in range(100)]
    assert sorted(found.dropped(rows, stage="a")) == [5]
    with pytest.raises(ConfigurationError, match="say which one"):
        found.keep(rows)
    with pytest.raises(MissingDataError, match="No suspect is of stage 'c'"):
        found.keep(rows, stage="c")


@pytest.fixture(scope="module")
def mislabelled(tmp_path_factory):
    """The last stage of three; queries are inputs near those whose label was learnt."""
    run = three_stages(tmp_path_factory.mktemp("run"), "adamw")
    return run, Analyzer(run.ledger, run.model)


def asked(run, analyzer, **settings):
    x, y = run.data["second"]
    examples = Examples.of_classes(x, y, ids=[f"second/{i}" for i in range(24)])
    error = Behavior.margin("answers as the first two", x[:2] + 0.05, y[:2])
    found = analyzer.suspects([error], ["second"], data={"second": examples}, k=2)
    return found, Removed(found, examples, [error], **settings)


def test_leaving_suspects_out_undoes_what_they_taught(mislabelled):
    run, analyzer = mislabelled
    before = {name: value.clone() for name, value in run.model.state_dict().items()}
    random_state = torch.get_rng_state()
    found, removed = asked(run, analyzer, others=[margins("others")], draws=2)
    assert found.recipe == DEFAULT_RECIPE.name
    assert {row.example for row in found.rows} == {"second/0", "second/1"}
    assert [row.step for row in found.rows] == [13, 13]  # of 16: the first of four batches, four times
    verified = analyzer.verify_removal("second", removed)
    assert all(torch.equal(value, before[name]) for name, value in run.model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert verified.drift < 1e-10  # float64
    assert (verified.removed, verified.examples) == (2, 24)
    undone, by_chance = (verified.undone("answers as the first two", arm) for arm in ("without", "random"))
    assert undone > 0.5
    assert by_chance < undone / 2
    means = {row.behavior: row for row in verified.summary()}
    assert means["loss of the suspects"].without > means["loss of the suspects"].again
    assert means["others"].kind == "other"
    assert [int(row.query) for row in verified.summary()] == [2, 7, 22, 2]
    assert means["answers as the first two"].trained == pytest.approx(means["answers as the first two"].again)
    assert f"{undone:.0%} of what the stage added is gone without the suspects" in repr(verified)
    assert any("later stages ['third'] were not run again" in caveat for caveat in verified.caveats)
    assert not any("its spread is not known" in caveat for caveat in verified.caveats)
    assert json.loads(json.dumps(verified.to_dict()))["undone"] == {"answers as the first two": undone}
    assert verified.to_table().num_rows == 2 + 7 + 22 + 2
    assert "Stage second again without 2 of 24 examples" in verified._repr_html_()


def test_a_program_of_the_user_s_is_told_what_to_leave_out(mislabelled):
    run, analyzer = mislabelled
    told = []

    def program(model, left_out):
        told.append(left_out)
        return run.programs["second"](model)  # leaves nothing out

    _, removed = asked(run, analyzer, program=program)
    verified = analyzer.verify_removal("second", removed)
    assert verified.drift == 0.0  # the very training
    assert verified.undone("answers as the first two") == 0.0
    assert sorted(map(len, told)) == [0, 2, 2]
    assert {"second/0", "second/1"} in told
    assert any("its spread is not known" in caveat for caveat in verified.caveats)


def test_verifying_what_cannot_be_is_refused(mislabelled):
    run, analyzer = mislabelled
    _, removed = asked(run, analyzer)
    x, y = run.data["second"]
    some = Examples.of_classes(x[1:], y[1:], ids=[f"second/{i}" for i in range(1, 24)])
    with pytest.raises(MissingDataError, match="1 of 2 suspects are not among the 23 given examples"):
        analyzer.verify_removal("second", replace(removed, examples=some))
    with pytest.raises(ConfigurationError, match="0 of the 24 examples of stage 'first' are suspects"):
        analyzer.verify_removal("first", removed)
    with pytest.raises(ConfigurationError, match="0 behaviors of the error"):
        analyzer.verify_removal("second", replace(removed, errors=[]))
