"""The tutorials run from their first block to the last, and print what the pages say they print.

Blocks of a page are one script, run in an empty folder by a Python of its own, as a reader would. Figures differ in
their last digits between machines, so that what is printed is held against the page without its numbers; what a page
claims in words about them is asserted below.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

from trainer_attrib import cli

ROOT = Path(__file__).parents[1]
PAGES = ROOT / "docs" / "tutorials"
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.DOTALL | re.MULTILINE)
END = "---- end of block ----"
NEEDS = {"trainer": ("transformers", "datasets"), "lightning": ("lightning",), "analyzer": ("bm25s",)}


@dataclass(frozen=True)
class Ran:
    """A block of Python of a page: what it printed, and what the page says that it prints, if it does."""

    code: str
    printed: str
    shown: str | None


def blocks(page: str) -> list[tuple[str, str]]:
    """(language, text) of every fenced block."""
    return BLOCK.findall((PAGES / f"{page}.md").read_text())


def run(page: str, folder: Path) -> list[Ran]:
    """Run a page in a folder."""
    found = blocks(page)
    code = [text for language, text in found if language == "python"]
    (folder / "page.py").write_text("".join(f"{text}\nprint({END!r}, flush=True)\n" for text in code))
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "integrations")]),
        "COLUMNS": "120",
    }
    done = subprocess.run(
        [sys.executable, "page.py"], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    printed = [re.sub(r"^\{'train_runtime.*\n", "", part.lstrip("\n"), flags=re.MULTILINE)
               for part in done.stdout.split(END)]  # fmt: skip
    following = zip(found, [*found[1:], ("", "")], strict=True)
    shown = [after[1] if after[0] == "text" else None for this, after in following if this[0] == "python"]
    return [Ran(*row) for row in zip(code, printed[:-1], shown, strict=True)]


@cache
def ran(page: str, folder: Path) -> list[Ran]:
    for package in NEEDS[page]:
        pytest.importorskip(package)
    (folder / page).mkdir()
    return run(page, folder / page)


@pytest.fixture(scope="module")
def tutorials(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tutorials")


def shape(text: str) -> list[str]:
    """Lines without numbers, column widths, verdicts on bars, and notes, which depend on numbers."""
    lines = [re.sub(r"[-+]?\d[\d.,]*(e[-+]?\d+)?%?", "#", line) for line in text.splitlines() if line.strip()]
    lines = [line.replace(" not reliable", "") for line in lines if not line.startswith("note:")]
    return [" ".join(re.sub(r"-{3,}", "", line).split()) for line in lines]


@pytest.mark.parametrize("name", sorted(NEEDS))
def test_a_page_prints_what_it_says(name, tutorials):
    told = [block for block in ran(name, tutorials) if block.shown is not None]
    assert len(told) >= 4
    for block in told:
        assert block.shown is not None
        assert shape(block.printed) == shape(block.shown), block.code
    assert (tutorials / name / "report.html").stat().st_size > 10_000


@pytest.mark.parametrize("name", sorted(NEEDS))
def test_commands_of_a_page_work_on_its_ledger(name, tutorials, monkeypatch, capsys):
    ran(name, tutorials)
    monkeypatch.chdir(tutorials / name)
    lines = [line for language, text in blocks(name) if language == "bash" for line in text.splitlines()]
    commands = [
        shlex.split(line)[1:] for line in lines if line.startswith(("trainer-attrib inspect", "trainer-attrib v"))
    ]
    assert commands
    for command in commands:
        assert cli.main(command) == 0, command
    assert "Traceback" not in capsys.readouterr().err


def test_every_tutorial_is_run():
    assert {path.stem for path in PAGES.glob("*.md")} == {*NEEDS}


def printed(page: str, tutorials: Path, part: str) -> str:
    return next(block.printed for block in ran(page, tutorials) if part in block.code)


def test_the_second_stage_taught_the_wrong_capitals_and_three_examples_did(tutorials):
    effects = printed("trainer", tutorials, 'method="retrain"')
    first, second = (float(found) for found in re.findall(r" (?:pretrain|tune) +([-+][\d.]+)$", effects, re.MULTILINE))
    assert second > 5 > abs(first)
    named = printed("trainer", tutorials, 'recipe="grad_cos"').splitlines()
    assert [line.split()[0].split("-") for line in named] == [
        ["planted", line.split(" of ")[1].split()[0]] for line in named
    ]
    told = printed("trainer", tutorials, "cleaned = ")
    after, before = (float(word) for word in re.findall(r"[-+]\d+\.\d", told))
    assert after < 0 < before


def test_wrong_labels_are_found(tutorials):
    for page, part, least in (
        ("lightning", "found = analyzer", 10), ("lightning", "self_influence", 6),
        ("analyzer", "self_influence", 18), ("analyzer", '"gauss_newton"', 20),
    ):  # fmt: skip
        assert int(printed(page, tutorials, part).split()[0]) >= least, (page, part)
    assert "hurt: forum" in printed("analyzer", tutorials, "by_source")
    assert "bit for bit" in printed("analyzer", tutorials, "closure")
