"""Both ends of a ranking equal the ranking of all scores; filters change which rows count, never their scores."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from tests.analysis.stages import margins, three_stages
from trainer_attrib import Analyzer
from trainer_attrib.analysis.recipes import streamed
from trainer_attrib.analysis.recipes.gauss_newton import GaussNewton
from trainer_attrib.analysis.retrieval.ends import Ends, ends_of, together
from trainer_attrib.analysis.retrieval.groups import StageSums, source_rows, step_rows
from trainer_attrib.analysis.retrieval.part_scores import PartSums, top_k
from trainer_attrib.analysis.retrieval.plan import Plan
from trainer_attrib.analysis.retrieval.sources import coded
from trainer_attrib.analysis.retrieval.visits import AllScores, numbered, part_sums, part_visits
from trainer_attrib.analysis.retrieval.where import Where
from trainer_attrib.errors import ConfigurationError
from trainer_attrib.ledger import writer
from trainer_attrib.numerics.scores import rank

QUERIES = 5


def parts_of(seed=0, examples=60, visits=3, values="normal", parts=9):
    """Tables and scores of an example's visits, spread over parts; the last example is visited once only."""
    generator = np.random.default_rng(seed)
    visited = np.append(generator.permutation(np.repeat(np.arange(examples - 1), visits)), examples - 1)
    scores = generator.normal(size=(QUERIES, len(visited)))
    if values == "ties":
        scores = generator.integers(-1, 2, scores.shape).astype(float)
    elif values == "unknown":
        scores[:, visited % 7 == 0] = np.nan
        scores[2] = np.nan
    elif values == "zeros":
        scores[:] = 0
    scores = scores.astype(np.float32)
    for at in np.array_split(np.arange(len(visited)), parts):
        ids = [f"id{(i * 37) % examples}" for i in visited[at]]
        yield pa.table({"example": ids, "step": at + 1}), scores[:, at]


def definition(parts, sums):
    """Scores of examples in float64, one at a time."""
    found: dict[str, list] = {}
    for table, scores_QN in parts:
        for example, scores_Q in zip(table["example"].to_pylist(), scores_QN.T, strict=True):
            found.setdefault(example, []).append(scores_Q.astype(np.float64))
    ids = list(found)
    return np.array(ids), np.array([np.sum(v, 0) if sums else np.mean(v, 0) for v in found.values()]).T


def summed(table, scores_QN):
    visits, at = part_visits(table)
    return PartSums(visits, part_sums(at, len(visits.ids), scores_QN), StageSums("one"))


def collected(parts, sums):
    every = AllScores(QUERIES, sums=sums)
    for table, scores_QN in parts:
        found = summed(table, scores_QN)
        every.add(found.visits, found.sums)
    return every.found()


def planned(parts):
    visits = [part_visits(table)[0] for table, _ in parts]
    at = numbered([part.ids for part in visits])[1]
    return Plan.of(visits, np.split(at, np.cumsum([len(part.ids) for part in visits])[:-1]))


def kept(parts, keep, sums, budget=1 << 20):
    plan, found = planned(parts), []
    groups = plan.groups(QUERIES, budget)
    for group in groups:
        ends = Ends(plan, group.stop - group.start, keep, sums=sums)
        for number, part in enumerate(parts):
            ends.add(top_k(summed(*part), plan, number, group, keep, sums=sums, groups=False))
        found.append(ends.found())
    return together(found), len(groups)


def ranked(found, query, k, largest):
    ids = np.array(found.ids, dtype=object)
    ids = (ids if found.places is None else ids[found.places[query]]).astype(str)
    at = rank(found.scores[query], ids, k, largest=largest)
    return [(ids[i], found.scores[query, i]) for i in at]


@pytest.mark.parametrize("sums", [True, False], ids=["sum", "mean"])
def test_all_scores_are_the_float64_definition(sums):
    parts = list(parts_of())
    ids, expected = definition(parts, sums)
    found = collected(parts, sums)
    assert found.ids == ids.tolist()
    np.testing.assert_array_equal(found.scores, expected.astype(np.float32))


@pytest.mark.parametrize("values", ["normal", "ties", "unknown", "zeros"])
@pytest.mark.parametrize("keep", [1, 7, 500])
@pytest.mark.parametrize(("visits", "sums"), [(1, False), (3, False), (3, True)])
def test_both_ends_are_the_same_bits_as_all_scores(values, keep, visits, sums):
    parts = list(parts_of(values=values, visits=visits))
    every = collected(parts, sums)
    ends, _ = kept(parts, keep, sums)
    assert ends.scores.shape[1] <= 2 * keep
    for query in range(QUERIES):
        for largest in (True, False):
            expected = ranked(every, query, keep, largest)
            assert ranked(ends, query, keep, largest) == expected
            assert len(expected) == (0 if values == "unknown" and query == 2 else min(keep, len(expected)))
    steps = dict(zip(every.ids, every.last_steps, strict=True))
    assert all(steps[i] == step for i, step in zip(ends.ids, ends.last_steps, strict=True))


def test_sums_of_few_queries_at_a_time_change_nothing():
    parts = list(parts_of())
    (whole, one), (split, several) = kept(parts, 6, False), kept(parts, 6, False, budget=2 * 8 * 60)
    assert (one, several) == (1, 3)
    for query in range(QUERIES):
        assert ranked(whole, query, 6, True) == ranked(split, query, 6, True)
        assert ranked(whole, query, 6, False) == ranked(split, query, 6, False)


def test_of_one_epoch_no_sums_are_held_beyond_a_part():
    assert planned(parts_of(examples=600, visits=1, parts=30)).open == 0
    assert 50 < planned(parts_of(visits=3)).open <= 60


@pytest.mark.parametrize("parts", [1, 4, 60])
def test_neither_the_order_nor_the_size_of_parts_changes_which_are_found(parts):
    reference, _ = kept(list(parts_of()), 5, False)
    other, _ = kept(list(parts_of(parts=parts))[::-1], 5, False)
    for query in range(QUERIES):
        first, second = (ranked(found, query, 5, True) for found in (reference, other))
        assert [i for i, _ in first] == [i for i, _ in second]
        np.testing.assert_allclose([s for _, s in first], [s for _, s in second], rtol=1e-6)


def test_ends_of_a_dense_matrix_are_its_ends():
    scores = np.random.default_rng(0).integers(-3, 4, (QUERIES, 40)).astype(np.float32)
    scores[1, :35], ids = np.nan, np.array([f"id{i}" for i in range(40)], dtype=object)
    found, places = ends_of(scores, ids, 4)
    for query in range(QUERIES):
        for largest in (True, False):
            expected = rank(scores[query], ids.astype(str), 4, largest=largest)
            names = ids[places[query]].astype(str)
            assert names[rank(found[query], names, 4, largest=largest)].tolist() == ids[expected].tolist()


def test_sums_over_sources_and_steps_are_those_of_the_rows():
    sums, everything, labels, steps = StageSums("one"), [], [], []
    for table, scores_QN in parts_of(values="unknown"):
        sources = [None if len(i) == 3 else i[-1] for i in table["example"].to_pylist()]
        sums.add(*coded(sources), table["step"].to_numpy(), scores_QN)
        everything.append(scores_QN.astype(np.float64))
        labels, steps = labels + sources, steps + table["step"].to_pylist()
    scores, labels, steps = np.concatenate(everything, 1), np.array(labels, dtype=object), np.array(steps)
    for row in source_rows([sums], 0):
        here = scores[0, labels == row["source"]]
        assert row["count"] == np.isfinite(here).sum() > 0
        assert row["sum"] == pytest.approx(np.nansum(here), abs=1e-12)
        assert row["mean"] == pytest.approx(np.nanmean(here), abs=1e-12)
    assert {row["count"] for row in source_rows([sums], 2)} == {0}
    for bins in (4, [1, 50, 170], 10_000):
        rows = step_rows([sums], 1, bins)
        assert sum(row["count"] for row in rows) == np.isfinite(scores[1]).sum()
        for row in rows:
            here = scores[1, (steps >= row["first_step"]) & (steps <= row["last_step"])]
            assert row["sum"] == pytest.approx(np.nansum(here), abs=1e-12)
    assert len(step_rows([sums], 1, 4)) == 4


@pytest.mark.parametrize("labels", [3, 100])
def test_a_score_without_bounds_stays_in_its_group(labels):
    sums, codes = StageSums("one"), np.arange(200) % labels
    scores = np.ones((1, 200), np.float32)
    scores[0, 1], scores[0, 2] = np.inf, np.nan
    sums.add([str(n) for n in range(labels)], codes, codes, scores)
    found = {row["source"]: row for row in source_rows([sums], 0)}
    assert found["1"]["sum"] == np.inf
    assert found["2"]["count"] == (codes == 2).sum() - 1
    assert all(found[str(n)]["sum"] == (codes == n).sum() - (n == 2) for n in range(labels) if n != 1)


@pytest.fixture(scope="module")
def analyzer(tmp_path_factory):
    """Three stages of four epochs; every step is a part of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writer, "ROLL_BYTES", 1)
        run = three_stages(tmp_path_factory.mktemp("run") / "ledger")
    found = Analyzer(run.ledger, run.model)
    assert len(found.lineage[0].parts()) == 16
    return found


@pytest.mark.parametrize("recipe", ["trackstar", "grad_cos", "grad_dot", "tracin"])
def test_kept_results_are_the_ends_of_dense_ones(analyzer, recipe):
    dense = analyzer.influence([margins()], recipe=recipe)
    ends = analyzer.influence([margins()], recipe=recipe, keep=5)
    assert ends.top(5).equals(dense.top(5))
    assert ends.bottom(4).equals(dense.bottom(4))
    assert ends.scores.shape == (7, 3 * 10)
    assert ends.caveats == dense.caveats
    assert ends.by_source().equals(dense.by_source())
    assert ends.by_steps(3).equals(dense.by_steps(3))
    assert analyzer.influence([margins()], recipe=recipe, keep=99).to_table().equals(dense.to_table())


def test_more_than_was_kept_is_refused(analyzer):
    ends = analyzer.influence([margins()], keep=2)
    with pytest.raises(ConfigurationError, match=r"5 examples were asked for, 2 of either end were kept"):
        ends.top(5)
    assert "2 at each" in str(ends.blocks()[0])
    with pytest.raises(ConfigurationError, match="at least 1"):
        analyzer.influence([margins()], keep=0)


@pytest.mark.parametrize("recipe", ["trackstar", "grad_cos"])
def test_the_score_of_an_example_does_not_depend_on_which_others_are_asked_for(analyzer, recipe):
    ids = ["first/3", "third/7", "third/21", "nowhere/0"]
    dense = analyzer.influence([margins()], recipe=recipe)
    few = analyzer.influence([margins()], recipe=recipe, where=Where(ids=ids))
    assert few.examples.ids.tolist() == ids[:3]
    columns = [dense.examples.ids.tolist().index(i) for i in ids[:3]]
    np.testing.assert_allclose(few.scores, dense.scores[:, columns], rtol=2e-6, atol=1e-7)


def test_a_range_of_steps_scores_only_the_visits_in_it(analyzer):
    """Contributions of the epochs add up to the whole; the rows of the first one are raw and left out."""
    whole = analyzer.influence([margins()], ["third"], "tracin")
    raw, *epochs = [
        analyzer.influence([margins()], ["third"], "tracin", where=Where(steps=(first, first + 3)))
        for first in (1, 5, 9, 13)
    ]
    assert len(raw.examples) == 0
    assert raw.top().num_rows == raw.by_source().num_rows == raw.by_steps().num_rows == 0
    for found, last in zip(epochs, (8, 12, 16), strict=True):
        assert found.examples.ids.tolist() == whole.examples.ids.tolist()
        assert found.examples.steps.max() == last
    np.testing.assert_allclose(sum(found.scores for found in epochs), whole.scores, rtol=1e-5, atol=1e-6)
    ranges = whole.by_steps([5, 9, 13]).to_pylist()
    assert [(row["first_step"], row["last_step"]) for row in ranges[:3]] == [(5, 8), (9, 12), (13, 16)]
    np.testing.assert_allclose(
        [row["sum"] for row in ranges[:3]], [found.scores[0].sum() for found in epochs], rtol=1e-4
    )


def test_rows_that_do_not_pass_are_not_read(analyzer, monkeypatch):
    read = []
    original = streamed.Part.rows
    monkeypatch.setattr(streamed.Part, "rows", lambda part: read.append(len(part.table)) or original(part))
    found = analyzer.influence([margins()], ["third"], "grad_cos", where=Where(ids=["third/3"], steps=(5, 16)))
    assert read == [1, 1, 1]
    assert len(found.examples) == 1


def test_conditions_are_checked(analyzer):
    with pytest.raises(ConfigurationError, match="a single string"):
        Where(sources="web")
    with pytest.raises(ConfigurationError, match="first, last"):
        Where(steps=(5, 2))
    with pytest.raises(ConfigurationError, match="chooses among recorded rows"):
        analyzer.influence([margins()], recipe=GaussNewton(), where=Where(steps=(1, 2)))


def test_sources_choose_examples():
    passes = Where(sources=["web", "books"], ids=["a", "c"]).of_stage(lambda: {"a": "web", "b": "books", "c": None})
    assert passes(pa.table({"example": ["a", "b", "c", "a"], "step": [1, 1, 2, 2]})).tolist() == [
        True,
        False,
        False,
        True,
    ]
    assert not Where(ids=[]).of_stage(dict)(pa.table({"example": ["a"], "step": [1]})).any()


def test_a_page_shows_the_groups(analyzer, tmp_path):
    page = analyzer.influence([margins()], keep=3).report(tmp_path / "page.html").read_text()
    assert "Influence of steps" in page
    assert "14 to 16" in page  # four ranges of steps 5 to 16: the rows of the first four are raw


def test_sums_of_several_parts_are_those_of_each(analyzer, monkeypatch):
    """Answers as large as parts are of several parts of a long ledger."""
    expected, tasks = analyzer.influence([margins()], ["first"], "fisher", controls=()), []

    def counted(work, asked):
        tasks.append([len(task[1]) if isinstance(task, tuple) else None for task in asked])  # None: of queries
        return map(work, asked)

    monkeypatch.setattr(analyzer.runner, "map", counted)
    stage = analyzer.lineage[0]
    few = stage.row_parts()
    monkeypatch.setattr(stage, "row_parts", lambda: few * 8)  # 128 parts: every row eight times
    found = analyzer.influence([margins()], ["first"], "fisher", controls=())
    assert [2] * 64 in tasks
    assert [16] * 8 in tasks  # scores: small parts have one answer together
    np.testing.assert_allclose(found.scores, expected.scores, rtol=1e-4)
