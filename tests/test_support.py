"""docs/support.md is what the markers, the untested list and the last run say."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.support import AREAS, SupportTable, untested

ROOT = Path(__file__).parents[1]
AGAIN = "; run `python benchmarks/support.py AREA` (see tests/support.py)"


@pytest.fixture
def rows() -> dict[tuple[str, str], dict]:
    written = json.loads((ROOT / "benchmarks" / "results" / "support.json").read_text())["rows"]
    return {(row["area"], row["combination"]): row for row in written}


@pytest.fixture
def table(request: pytest.FixtureRequest) -> SupportTable:
    return request.config.pluginmanager.get_plugin("support-table")


def test_the_page_shows_the_results_of_the_last_run(rows: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.delitem(sys.modules, "support", raising=False)
    import support  # type: ignore[import-not-found]

    assert (ROOT / "docs" / "support.md").read_text() == support.page(support.ordered(
        [row for row in rows.values() if row["tests"]]
    )), f"docs/support.md is stale{AGAIN}"  # fmt: skip


def test_every_marked_test_is_in_the_table(rows: dict, table: SupportTable, request: pytest.FixtureRequest) -> None:
    """In both directions, for the test files that this session collected."""
    if any("::" in argument for argument in request.config.args):
        pytest.skip("files were collected in part")
    files = {item.nodeid.partition("::")[0] for item in request.session.items}
    claimed = {(key, test) for key, claim in table.claims.items() for test in claim.tests}
    written = {(key, test) for key, row in rows.items() for test in row["tests"] if test.partition("::")[0] in files}
    assert sorted({pair for pair in claimed if pair[1].partition("::")[0] in files} ^ written) == [], AGAIN


def test_a_refusal_is_written_as_one(rows: dict, table: SupportTable) -> None:
    for key, claim in table.claims.items():
        assert rows[key]["state"] in ("not tested", "refused" if claim.refused else "verified"), AGAIN


def test_untested_combinations_have_a_reason_and_no_test(rows: dict, table: SupportTable) -> None:
    for key, reason in untested().items():
        assert key[0] in AREAS
        assert len(reason) > 10, f"{key}: say why"
        assert key not in table.claims, f"{key} has a test now: remove it from tests/support_untested.toml"
        assert rows[key]["state"] == "not tested"


def test_no_marked_test_failed_when_the_page_was_written(rows: dict) -> None:
    assert [row["reason"] for row in rows.values() if row["reason"].endswith(" failed")] == []
