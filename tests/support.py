"""What is supported, as the tests found it: collects claims (markers) and outcomes for docs/support.md.

Adding a row: put ``@support("PEFT", "LoRA")`` (area, combination; ``from tests.support import support``) on every test
that proves the combination, or ``marks=support(...)`` on a parameter of one; ``refused=True`` where the test asserts
that the combination is refused with a message. A combination is either verified or refused, never both: name the two
halves apart. If it was listed in tests/support_untested.toml, remove it there; a combination that nobody tests is added
there with the reason. Then run ``python benchmarks/support.py PEFT``, which runs all tests of that area and rewrites
its rows in docs/support.md; tests/test_support.py fails while the page differs from the markers. After a merge conflict
in the page, take either side and run it again. A new area is a new name in ``AREAS`` below. The wording of a
combination is what users read: name the thing as they know it.

A row is verified (refused) only if all of its tests passed in the run that wrote it; a test that was skipped or failed
leaves it not tested, with the reason. There is no fourth state. Only parts of the contract suite that an integration
says it has not are no problem for its row: name what they would prove in a row of its own.
"""

from __future__ import annotations

import json
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from trainer_attrib.testing.contract import NOT_SUPPORTED

AREAS = (
    "Training loops",
    "Data",
    "Layers",
    "Optimizers",
    "Precision and compilation",
    "TRL",
    "PEFT",
    "Many processes",
    "Shadows",
    "Forecasts",
)
UNTESTED = Path(__file__).with_name("support_untested.toml")
Key = tuple[str, str]
"""(area, combination)."""

support = pytest.mark.support


@dataclass
class Claim:
    """What the tests of one combination say: their names, whether they show a refusal, and what became of each."""

    refused: bool
    tests: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    passed: int = 0

    def row(self, key: Key) -> dict[str, Any]:
        """The row of the table: area, combination, state, reason (where not tested) and tests."""
        if self.problems or not self.passed:
            state, reason = "not tested", self.problems[0] if self.problems else "its tests did not run"
        else:
            state, reason = "refused" if self.refused else "verified", ""
        return dict(zip(("area", "combination"), key, strict=True)) | {
            "state": state, "reason": reason, "tests": sorted(set(self.tests)),
        }  # fmt: skip


def untested() -> dict[Key, str]:
    """Combinations without a test, and why."""
    listed = tomllib.loads(UNTESTED.read_text())
    return {(area, combination): why for area, rows in listed.items() for combination, why in rows.items()}


class SupportTable:
    """Collects the claims of all collected tests, before any is deselected, and their outcomes."""

    def __init__(self, areas: str | None, file: str | None) -> None:
        self.claims: dict[Key, Claim] = {}
        self._areas = None if areas is None else {area.strip() for area in areas.split(",")}
        self._file = file
        self._keys: dict[str, list[Key]] = {}

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        """Read the markers; with ``--support``, leave only tests of the wanted areas."""
        for item in items:
            self._keys[item.nodeid] = keys = [self._claim(item, mark) for mark in item.iter_markers("support")]
            for key in keys:
                self.claims[key].tests.append(_shown(item))
        if self._areas is not None:
            wanted = [i for i in items if any(area in self._areas for area, _ in self._keys[i.nodeid])]
            config.hook.pytest_deselected(items=[item for item in items if item not in wanted])
            items[:] = wanted

    def _claim(self, item: pytest.Item, mark: pytest.Mark) -> Key:
        area, combination = mark.args
        refused = mark.kwargs.get("refused", False)
        if area not in AREAS:
            raise pytest.UsageError(f"{item.nodeid}: no area '{area}'; there are {', '.join(AREAS)} (tests/support.py)")
        if self.claims.setdefault((area, combination), Claim(refused)).refused is not refused:
            raise pytest.UsageError(f"{item.nodeid}: '{combination}' is claimed as verified and as refused")
        return area, combination

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Note what became of a test."""
        for key in self._keys.get(report.nodeid, ()):
            claim = self.claims[key]
            if report.failed:
                claim.problems.insert(0, f"{report.nodeid.partition('[')[0]} failed")
            elif report.skipped:
                why = report.longrepr[2] if isinstance(report.longrepr, tuple) else "expected to fail"
                if NOT_SUPPORTED not in why:
                    claim.problems.append(why.removeprefix("Skipped: "))
            elif report.when == "call":
                claim.passed += 1

    def pytest_sessionfinish(self) -> None:
        """Write the rows of the wanted areas."""
        if self._file is not None:
            wanted = {k: c for k, c in self.claims.items() if self._areas is None or k[0] in self._areas}
            Path(self._file).write_text(json.dumps([claim.row(key) for key, claim in wanted.items()]))


def _shown(item: pytest.Item) -> str:
    """The test's name without its parameters; of a class that is marked as a whole, the class's."""
    name = item.nodeid.partition("[")[0]
    kind = getattr(item, "cls", None)
    whole = kind is not None and any(mark.name == "support" for mark in getattr(kind, "pytestmark", ()))
    return name.rpartition("::")[0] if whole else name


def pytest_addoption(parser: pytest.Parser) -> None:
    """For benchmarks/support.py."""
    group = parser.getgroup("support", "what docs/support.md is made of")
    group.addoption("--support", metavar="AREAS", help="run only tests marked with these areas, separated by commas")
    group.addoption("--support-json", metavar="FILE", help="write the rows of the support table")


def pytest_configure(config: pytest.Config) -> None:
    """Declare the marker and start collecting."""
    config.addinivalue_line("markers", "support(area, combination, refused=False): proves a row of docs/support.md")
    table = SupportTable(config.getoption("--support"), config.getoption("--support-json"))
    config.pluginmanager.register(table, "support-table")
