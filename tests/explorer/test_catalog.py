"""What the page is fed with, live or from a file, is what the ledger and the analyzer say."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from tests.explorer.ledgers import HOSTILE, PLAIN, answered, behaviors, record, recorded
from trainer_attrib import Analyzer
from trainer_attrib.analysis.keeping import keep
from trainer_attrib.errors import (
    ConfigurationError,
    LedgerError,
    LedgerNotFoundError,
    LedgerNotWritableError,
    StageNotFoundError,
)
from trainer_attrib.explorer.catalog import Catalog
from trainer_attrib.explorer.example_table import Conditions
from trainer_attrib.explorer.one_file import bundle_of, write_report
from trainer_attrib.ledger.kept import Answers, key_of
from trainer_attrib.ledger.reader import Ledger
from trainer_attrib.ledger.storage import Storage


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    ledger, model, keys = answered(tmp_path_factory.mktemp("explored"))
    return Catalog(ledger), model, keys


def test_every_page_is_json(made):
    catalog, _, keys = made
    paths = ["ledger", "facets", "answers", "examples", "curves/first", "map/second"]
    for path in [*paths, *(f"answers/{key}" for key in keys.values())]:
        json.dumps(catalog.data(path, {}), allow_nan=False)
    for path in ("nothing", "ledger/more", ""):
        with pytest.raises(LookupError):
            catalog.data(path, {})
    with pytest.raises(StageNotFoundError):
        catalog.data("curves/third", {})
    with pytest.raises(StageNotFoundError):
        catalog.data("map/..", {})


def test_conditions_choose_examples(made):
    table = made[0].examples
    assert len(table) == len(HOSTILE) + 5 * len(PLAIN)
    rows = table.table.to_pylist()
    for wanted in (
        Conditions(), Conditions(stage="second"), Conditions(source="web"), Conditions(first=2, last=3),
        Conditions(text="LIMA"), Conditions(text="(.*"), Conditions(stage="first", source="books", last=2),
    ):  # fmt: skip
        expected = [
            (wanted.stage in (None, r["stage"])) and (wanted.source in (None, r["source"]))
            and (wanted.first or 0) <= r["step"] <= (wanted.last or 99)
            and (wanted.text is None or wanted.text.lower() in r["text"].lower())
            for r in rows
        ]  # fmt: skip
        assert table.matching(wanted).tolist() == expected
    page = table.page(Conditions(stage="second"), offset=14, limit=10)
    assert (page["matching"], len(page["rows"])) == (16, 2)
    assert table.facets()["stages"]["second"] == {"examples": 16, "last_step": 4}
    with pytest.raises(ConfigurationError, match="no whole number"):
        Conditions.of({"first": "-3"})


def test_a_filtered_ranking_is_the_ranking_of_what_meets_the_conditions(made):
    catalog, model, keys = made
    influence = Analyzer(catalog.ledger.storage.url, model).influence(behaviors()[:1])
    for query in range(3):
        found = catalog.data(
            f"answers/{keys['influence']}/filtered", {"query": str(query), "stage": "second", "limit": "5"}
        )
        second = influence.examples.stages == "second"
        scores = np.where(second, influence.scores[query], np.nan)
        assert found["matching"] == 16
        assert [row["score"] for row in found["top"]] == pytest.approx(np.sort(scores[second])[::-1][:5])
        assert [row["score"] for row in found["bottom"]] == pytest.approx(np.sort(scores[second])[:5])
        by_id = dict(zip(influence.examples.ids, influence.scores[query], strict=True))
        assert all(by_id[row["example"]] == pytest.approx(row["score"]) for row in found["top"])
    with pytest.raises(LookupError):
        catalog.data(f"answers/{keys['influence']}/filtered", {"query": "3"})
    with pytest.raises(LookupError):
        catalog.data(f"answers/{keys['effects']}/filtered", {})


def test_the_map_is_the_plane_of_largest_variance(made):
    """Held against the eigenvectors of the rows' covariance."""
    catalog = made[0]
    stage = catalog.ledger.stage("second")
    rows = np.concatenate([np.asarray(block.sketches, np.float64) for block in stage.rows()])
    values = np.linalg.eigvalsh(np.cov(rows.T))[::-1]
    found = catalog.data("map/second", {})
    assert found["variance_shown"] == pytest.approx(values[:2].sum() / values.sum(), rel=1e-3)
    points = np.array(found["points"], float)
    assert points.shape == (16, 2)
    assert points.min() == 0
    assert points.max() == 1023
    assert [found["sources"][i] for i in found["source"]] == ["books", "web"] * 8
    assert catalog.has_map("second")
    assert all(answer["kinds"] != ["map"] for answer in catalog.data("answers", {})["answers"])


def test_kept_answers_replace_older_ones_and_have_no_nan(tmp_path):
    answers = Answers(Ledger(recorded(tmp_path)[0]).storage)
    first = answers.keep("one", [{"kind": "blocks", "value": math.nan, "nested": [math.inf, {"x": 1.5}]}], {"q": 1})
    assert answers.read(first)["parts"] == [{"kind": "blocks", "value": None, "nested": [None, {"x": 1.5}]}]
    assert answers.keep("two", [], {"q": 1}) == first == key_of({"q": 1})
    assert [answer["title"] for answer in answers.listed()] == ["two"]
    with pytest.raises(LedgerNotFoundError, match="keys:"):
        answers.read("0123")
    for key in ("../stage", "a/b", "", "A", "x" * 81):
        with pytest.raises(ConfigurationError, match="no key"):
            answers.read(key)
    with pytest.raises(ConfigurationError, match="no result"):
        keep(tmp_path / "ledger")


def test_the_report_is_one_file_with_everything(made, tmp_path):
    catalog, _, keys = made
    path = write_report(catalog.ledger.storage.url, tmp_path / "sub" / "report.html", "<b>title</b>")
    text = path.read_text()
    data = text.split('id="bundle">')[1].split("</script>")[0]
    assert json.loads(data) == json.loads(json.dumps(bundle_of(catalog, "<b>title</b>")))
    assert "<" not in data
    assert {f"0/answers/{key}" for key in keys.values()} < json.loads(data).keys()
    assert "<b>title" not in text.split("<body>")[0]
    assert len(text) - len(data) < 1_000_000
    with pytest.raises(LedgerError):
        write_report(tmp_path / "nowhere", tmp_path / "none.html")
    assert not (tmp_path / "none.html").exists()


def test_what_is_recorded_meanwhile_is_seen(tmp_path):
    """The page stays open while another stage is trained."""
    ledger, model = recorded(tmp_path)
    catalog = Catalog(ledger)
    before, state = len(catalog.examples), catalog.state
    catalog.data("map/first", {})
    record(ledger, model, "third", PLAIN)
    assert len(catalog.examples) == before + len(PLAIN)
    assert catalog.state != state
    assert not catalog.has_map("first")  # kept for another state
    assert [stage["name"] for stage in catalog.data("ledger", {})["stages"]] == ["first", "second", "third"]


def test_a_ledger_that_cannot_be_written_is_shown_and_reported(tmp_path, monkeypatch):
    ledger, _ = recorded(tmp_path)

    def refused(*_: object) -> None:
        raise LedgerNotWritableError("No.")

    monkeypatch.setattr(Storage, "write", refused)
    catalog = Catalog(ledger)
    first = catalog.data("map/first", {})
    assert catalog.has_map("first")
    assert catalog.data("map/first", {}) == first
    assert write_report(ledger, tmp_path / "report.html").exists()
    assert Answers(catalog.ledger.storage).keys() == []
