"""Candidates of an approximate index: exact scores, and a recall that is what it is said to be."""

from __future__ import annotations

import re
import subprocess
import sys

import numpy as np
import pytest

from tests.analysis.stages import margins, three_stages
from trainer_attrib import Analyzer
from trainer_attrib.analysis.recipes.gauss_newton import GaussNewton
from trainer_attrib.analysis.recipes.trackstar import TrackStar
from trainer_attrib.analysis.retrieval import faiss_candidates
from trainer_attrib.analysis.retrieval.faiss_candidates import Faiss, Index
from trainer_attrib.analysis.retrieval.where import Where
from trainer_attrib.errors import ConfigurationError

pytest.importorskip("faiss")


@pytest.fixture(scope="module")
def analyzer(tmp_path_factory):
    """Three stages of four epochs, with several second-moment versions."""
    run = three_stages(tmp_path_factory.mktemp("run") / "ledger")
    return Analyzer(run.ledger, run.model)


def said(found):
    """The recall of every stage, as the caveats say it."""
    return [float(r) for c in found.caveats for r in re.findall(r"recall@\d+ against the exact scan is ([\d.]+)", c)]


@pytest.mark.parametrize("recipe", ["trackstar", TrackStar(unit_norm=False), "fisher", "grad_cos", "grad_dot"])
def test_with_all_rows_as_candidates_the_result_is_the_exact_scan(analyzer, recipe):
    exact = analyzer.influence([margins()], recipe=recipe, keep=5)
    found = analyzer.influence([margins()], recipe=recipe, keep=5, candidates=Faiss())
    assert found.to_table().equals(exact.to_table())
    assert said(found) == [1, 1, 1]
    assert set(exact.caveats) < set(found.caveats)
    assert found.by_source().num_rows == 0


@pytest.mark.parametrize("recipe", ["trackstar", TrackStar(unit_norm=False), "fisher", "grad_cos", "grad_dot"])
def test_the_vectors_of_rows_and_queries_order_rows_as_the_scores_do(analyzer, recipe):
    """One candidate per end, one visit per example: the best and the worst row must be among what is proposed."""
    where = Where(steps=(13, 16))  # the last epoch
    dense = analyzer.influence([margins()], recipe=recipe, where=where)
    found = analyzer.influence(
        [margins()], recipe=recipe, where=where, keep=1, candidates=Faiss(candidates=1, probed=1)
    )
    assert len(found.examples) < len(dense.examples)
    assert said(found) == [1, 1, 1]


def test_what_is_found_has_its_exact_score_and_the_recall_is_true(analyzer, monkeypatch):
    """An index that proposes too little: only every third of the right ones."""
    propose = Index.propose
    monkeypatch.setattr(Index, "propose", lambda *a: frozenset(sorted(propose(*a))[::3]))
    dense = analyzer.influence([margins()], ["third"], "grad_dot")
    found = analyzer.influence([margins()], ["third"], "grad_dot", keep=6, candidates=Faiss(measured=None))
    scores = {(r["query"], r["example"]): r["score"] for r in dense.to_table().to_pylist()}
    hits = wanted = 0
    for mine, true in ((found.top(6), dense.top(6)), (found.bottom(6), dense.bottom(6))):
        for row in mine.to_pylist():
            np.testing.assert_allclose(row["score"], scores[row["query"], row["example"]], rtol=2e-6, atol=1e-7)
        keys = [{(r["query"], r["example"]) for r in table.to_pylist()} for table in (mine, true)]
        hits, wanted = hits + len(keys[0] & keys[1]), wanted + len(keys[1])
    assert 0 < hits < wanted
    assert said(found) == [pytest.approx(hits / wanted, abs=5e-4)]


def test_an_index_is_kept_where_rows_do_not_depend_on_the_queries(analyzer, monkeypatch):
    built = []
    original = faiss_candidates.Index.__post_init__
    monkeypatch.setattr(Index, "__post_init__", lambda index, rows: built.append(1) or original(index, rows))
    index = Faiss()
    for recipe, count in (("grad_cos", 1), (TrackStar(task=False), 1), ("trackstar", 2)):
        built.clear()
        calls = [analyzer.influence([margins()], ["third"], recipe, keep=3, candidates=index) for _ in range(2)]
        assert len(built) == count
        assert calls[0].to_table().equals(calls[1].to_table())
        assert any("that the index was first used for" in c for c in calls[1].caveats) == (count == 1)
    built.clear()
    where = Where(ids=["third/3", "third/7"])
    found = analyzer.influence([margins()], ["third"], "grad_cos", where=where, keep=3, candidates=index)
    assert len(built) == 1
    assert set(found.examples.ids) == {"third/3", "third/7"}


def test_what_cannot_be_is_refused(analyzer):
    for recipe in ("tracin", GaussNewton()):
        with pytest.raises(ConfigurationError, match="has no candidates"):
            analyzer.influence([margins()], recipe=recipe, keep=3, candidates=Faiss())
    with pytest.raises(ConfigurationError, match="keep=None with 1000 candidates"):
        analyzer.influence([margins()], candidates=Faiss())
    with pytest.raises(ConfigurationError, match="keep=3 with 2 candidates"):
        analyzer.influence([margins()], keep=3, candidates=Faiss(candidates=2))
    for wrong in ({"candidates": 0}, {"probed": 0}, {"measured": 0}):
        with pytest.raises(ConfigurationError, match="Faiss got"):
            Faiss(**wrong)


def test_a_missing_extra_says_what_to_install():
    code = (
        "import sys; sys.modules['faiss'] = None\n"
        "from trainer_attrib.analysis.retrieval.faiss_candidates import Faiss\n"
        "try: Faiss().check(1)\n"
        "except ImportError as error: print(error)"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "pip install 'trainer-attrib[faiss]'" in printed
