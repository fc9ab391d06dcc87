"""Figures in the documentation are those of benchmarks/results, with the environment beside them."""

from __future__ import annotations

import json
import re

import pytest

from benchmarks import provenance

AGAIN = "run `python benchmarks/provenance.py`"
ELSEWHERE = {"support"}  # docs/support.md is its page


def test_pages_say_what_the_results_say():
    found = provenance.pages()
    assert {"benchmarks.md", "influence.md"} <= {path.name for path in found}
    for path in found:
        assert path.read_text() == provenance.filled(path.read_text()), f"{path.name} is stale; {AGAIN}"


def test_every_result_is_on_the_page():
    page = (provenance.ROOT / "docs" / "benchmarks.md").read_text()
    shown = {provenance.TABLES[name].source for name in re.findall(r"<!-- begin ([\w-]+) -->", page)}
    assert shown == {path.stem for path in provenance.RESULTS.glob("*.json")} - ELSEWHERE


def test_markers_are_closed_and_known():
    for path in provenance.pages():
        begun, ended = (re.findall(rf"<!-- {word} ([\w-]+) -->", path.read_text()) for word in ("begin", "end"))
        assert begun == ended
        assert {*begun} <= {*provenance.TABLES}


@pytest.mark.parametrize("name", provenance.TABLES)
def test_numbers_have_their_environment_beside_them(name):
    table = provenance.TABLES[name]
    result = json.loads((provenance.RESULTS / f"{table.source}.json").read_text())
    text = table.text()
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert len(rows) > 3
    assert len({line.count("|") for line in rows}) == 1
    for told in (result["environment"]["cpu"], result["environment"]["torch"], f"benchmarks/{table.source}.py"):
        assert told in text
    missed = [check for check, held in result["checks"].items() if not held["ok"]]
    assert all(check in text for check in missed)


def test_a_figure_that_changed_is_noticed():
    page = (provenance.ROOT / "docs" / "benchmarks.md").read_text()
    figure = re.search(r"\| raw \| (\d\.\d{3}) \|", page)
    assert figure
    wrong = page.replace(figure[0], "| raw | 1.000 |")
    assert wrong != page == provenance.filled(wrong)


def test_cells():
    assert [provenance.shown(v) for v in (None, True, 0.12345, 131.07, "a|b")] == [
        "-",
        "yes",
        "0.123",
        "131.1",
        "a\\|b",
    ]


QUOTED = {  # in docs/faq.md: (result, what the row is, column)
    "0.924": ("fact_tracing", {"data": "BoolQ (SmolLM2)", "ranking": "bm25"}, "MRR"),
    "0.493": ("fact_tracing", {"data": "BoolQ (SmolLM2)", "ranking": "TrackStar (mixed R)"}, "MRR"),
    "0.034": ("fact_tracing", {"data": "BoolQ (SmolLM2)", "ranking": "bm25"}, "tail-patch"),
    "0.030": ("fact_tracing", {"data": "BoolQ (SmolLM2)", "ranking": "TrackStar (mixed R)"}, "tail-patch"),
    "0.599": ("fact_tracing", {"data": "BoolQ (SmolLM2) rank 32", "ranking": "TrackStar (mixed R)"}, "MRR"),
    "0.039": ("fact_tracing", {"data": "BoolQ (SmolLM2) rank 32", "ranking": "TrackStar (mixed R)"}, "tail-patch"),
    "0.025": ("fact_tracing", {"data": "country facts", "ranking": "bm25"}, "MRR"),
    "-0.002": ("fact_tracing", {"data": "country facts", "ranking": "bm25"}, "tail-patch"),
    "0.986": ("fact_tracing", {"data": "country facts", "ranking": "bm25, names only"}, "MRR"),
    "0.040": ("fact_tracing", {"data": "country facts", "ranking": "bm25, names only"}, "tail-patch"),
    "0.568": ("fact_tracing", {"data": "country facts", "ranking": "TrackStar (mixed R)"}, "MRR"),
    "0.052": ("fact_tracing", {"data": "country facts", "ranking": "TrackStar (mixed R)"}, "tail-patch"),
    "0.270": ("influence_lds", {"testbed": "chargpt", "method": "tf-idf of characters"}, "LDS"),
    "0.160": ("influence_lds", {"testbed": "chargpt", "method": "grad_cos, recorded rows"}, "LDS"),
    "0.422": ("influence_lds", {"testbed": "chargpt", "method": "gauss_newton, rank 256, 2 states"}, "LDS"),
    "0.52": ("influence_lds", {"testbed": "chargpt", "method": "gauss_newton, rank 256, 2 states"}, "x training"),
    "1.5": ("influence_lds", {"testbed": "chargpt", "method": "gauss_newton, default"}, "x training"),
    "0.53": ("shadow_overhead", {"run": "thin=4"}, "for the shadow"),
    "0.79": ("pass_cost", {"model": "language model", "rows": "factored"}, "ratio"),
    "0.24": ("stage_effects", {"regime": "LM AdamW standard", "method": "noise floor"}, "rel. error"),
    "0.997": ("mislabel", {"data": "digits", "method": "loss"}, "AUC"),
    "0.977": ("mislabel", {"data": "Fashion-MNIST", "method": "loss"}, "AUC"),
    "0.988": ("mislabel", {"data": "digits", "method": "fisher, self"}, "AUC"),
    "0.948": ("mislabel", {"data": "Fashion-MNIST", "method": "fisher, self"}, "AUC"),
}


@pytest.mark.parametrize("quoted", QUOTED)
def test_answers_quote_the_results(quoted):
    source, wanted, column = QUOTED[quoted]
    rows = json.loads((provenance.RESULTS / f"{source}.json").read_text())["rows"]
    (row,) = [row for row in rows if wanted.items() <= row.items()]
    digits = len(quoted.partition(".")[2])
    assert float(quoted) == pytest.approx(row[column], abs=0.51 * 10**-digits)
    shown = f"{float(quoted):.0%}".replace("%", " %") if quoted == "0.24" else quoted
    assert re.search(rf"(?<![\d.+-]){re.escape(shown)}(?!\d)", (provenance.ROOT / "docs" / "faq.md").read_text())
