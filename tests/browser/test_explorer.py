"""Every view, in a browser, on the ledger that the demo leaves: what is shown is there, nothing goes wrong, nobody
else is asked. Hostile texts are shown and never run."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("playwright.sync_api")
pytest.importorskip("starlette")

from tests.explorer.ledgers import HOSTILE, answered
from trainer_attrib.explorer.one_file import write_report
from trainer_attrib.explorer.serving import Served, explorer_of
from trainer_attrib.integrations.given_data import load_model
from trainer_attrib.ledger.kept import Answers
from trainer_attrib.ledger.reader import Ledger


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that ``trainer-attrib demo`` fills, or one that it filled (DEMO_RUN)."""
    there = os.environ.get("DEMO_RUN")
    if there and Path(there).exists():
        return Path(there)
    folder = tmp_path_factory.mktemp("demo") / "run"
    command = [sys.executable, "-m", "trainer_attrib", "demo", "--out", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.fixture(scope="session")
def served(demo: Path) -> Iterator[Served]:
    model, tokenizer = load_model(str(demo / "model"))
    with Served(explorer_of([demo / "ledger", demo / "ledger"], model, tokenizer)) as served:
        yield served


@pytest.fixture(scope="session")
def answers(demo: Path) -> dict[str, str]:
    """Keys by the beginning of the title."""
    return {head["title"]: head["key"] for head in Answers(Ledger(demo / "ledger").storage).listed()}


def key(answers: dict[str, str], beginning: str) -> str:
    return next(found for title, found in answers.items() if title.startswith(beginning))


def test_the_ledger_is_a_tree_with_curves(served: Served, watched: Any) -> None:
    one = watched(served.url)
    page = one.open(served.url, ".tree .stage >> nth=2")
    assert page.locator(".stage b").all_inner_texts() == ["pretrain", "sft", "dpo"]
    assert page.locator(".tree ul ul .stage").count() == 1  # dpo lies below sft, which lies below pretrain
    assert page.locator("figure svg").count() == 3
    assert page.get_by_role("link", name="Ledger").get_attribute("aria-current") == "page"
    one.shot("ledger")


def test_stage_effects_are_a_waterfall_and_a_heat_map(served: Served, watched: Any, answers: dict[str, str]) -> None:
    one = watched(served.url)
    at = f"{served.url}#/0/answers/{key(answers, 'What each stage did')}"
    page = one.open(at, "text=one stage after another")
    assert page.locator("figure").count() == 2
    page.get_by_label("Method", exact=True).select_option("retrain")
    page.get_by_label("Behavior", exact=True).select_option("asserts planted wrong capitals")
    assert "by retrain" in page.locator("figcaption").first.inner_text()
    assert "method=retrain" in page.url  # what is on screen can be linked to
    page.get_by_text("as a table").first.click()
    told = page.locator("details[open] tbody tr").all_inner_texts()
    assert [row.split("\t")[0] for row in told] == ["pretrain", "sft", "dpo", "(interaction)", "all of training"]
    one.shot("effects")


def test_influence_is_shown_filtered_and_highlighted(served: Served, watched: Any, answers: dict[str, str]) -> None:
    one = watched(served.url)
    page = one.open(f"{served.url}#/0/answers/{key(answers, 'Who taught the planted wrong capitals (tr')}", ".card")
    assert page.locator("figcaption", has_text="Over training").count() == 1
    assert "2,635 examples" in page.get_by_text("Recipe trackstar").inner_text()
    one.shot("influence")
    page.get_by_label("Source", exact=True).select_option("=planted")
    page.wait_for_selector("text=/among \\d+ of 2,635 examples/")
    facts = page.locator(".card > .facts").all_inner_texts()
    assert facts
    assert all("· planted ·" in fact for fact in facts)
    first = page.locator(".card .text").first
    word = first.inner_text().split()[-1].strip(".")
    page.get_by_label("Highlight").fill(word)
    page.wait_for_selector("#marked:has-text('texts')")
    assert page.evaluate("[...CSS.highlights.get('found')].length") >= 1
    page.get_by_label("Text contains").fill("no example says this")
    page.wait_for_selector("text=among 0 of 2,635")
    assert page.get_by_text("No example.").count() == 2
    assert "text=no+example+says+this" in page.url
    page.reload()  # the address is the whole state
    page.wait_for_selector("text=among 0 of 2,635")
    assert page.get_by_label("Source", exact=True).input_value() == "=planted"


def test_clicking_a_word_highlights_it(served: Served, watched: Any) -> None:
    page = watched(served.url).open(f"{served.url}#/0/examples", ".card")
    page.get_by_label("Text contains").fill("The capital of Peru is Lima.")
    page.wait_for_selector("text=/1 to \\d of \\d matching/")
    box = page.locator(".card .text").first.bounding_box()
    page.mouse.click(box["x"] + 10, box["y"] + 8)
    assert page.get_by_label("Highlight").input_value() == "The"
    assert page.evaluate("[...CSS.highlights.get('found')].every(r => r.toString().toLowerCase() === 'the')")
    assert "mark=The" in page.url


def test_what_is_on_screen_is_exported(served: Served, watched: Any, answers: dict[str, str], tmp_path: Path) -> None:
    page = watched(served.url).open(
        f"{served.url}#/0/answers/{key(answers, 'Who taught the planted wrong capitals (tr')}", ".card"
    )
    found = {}
    for name in ("JSON", "CSV", "PAIR"):
        with page.expect_download() as waiting:
            page.get_by_role("button", name=name, exact=True).click()
        waiting.value.save_as(tmp_path / name)
        found[name] = (tmp_path / name).read_text()
    data = json.loads(found["JSON"])
    rows = list(csv.DictReader(found["CSV"].splitlines()))
    [record] = [json.loads(line) for line in found["PAIR"].splitlines()]
    assert len(data["top"]) == 20
    assert len(rows) == 40
    assert [float(row["score"]) for row in rows[:20]] == [row["score"] for row in data["top"]]
    assert record["proponents"] == [row["text"] for row in data["top"]]
    assert record["opponent_ids"] == [f"{row['stage']}/{row['example']}" for row in data["bottom"]]


def test_examples_are_paged(served: Served, watched: Any) -> None:
    one = watched(served.url)
    page = one.open(f"{served.url}#/0/examples", ".card")
    assert page.locator(".card").count() == 50
    first = page.locator(".card .facts").first.inner_text()
    page.get_by_role("button", name="Next").click()
    page.wait_for_selector("text=51 to 100 of 2,635")
    assert page.locator(".card .facts").first.inner_text() != first
    page.get_by_role("button", name="Previous").click()
    page.wait_for_selector("text=1 to 50 of 2,635")
    assert page.locator(".card .facts").first.inner_text() == first


def test_the_map_is_drawn_and_tells_by_pointer_and_by_keys(served: Served, watched: Any) -> None:
    one = watched(served.url)
    page = one.open(f"{served.url}#/0/map/sft", "canvas")
    drawn = "document.querySelector('canvas').getContext('2d').getImageData(0, 0, 680, 680).data.some(v => v)"
    assert page.evaluate(drawn)
    page.locator("canvas").focus()
    page.keyboard.press("ArrowRight")
    page.wait_for_selector(".card")
    told = page.locator(".card .facts").inner_text()
    page.keyboard.press("ArrowRight")
    page.wait_for_function("told => document.querySelector('.card .facts').innerText !== told", arg=told)
    one.shot("map")
    for button in page.locator(".legend button").all():
        button.click()
    assert not page.evaluate(drawn) or page.locator(".card").count()  # only the mark of the selected one is left


def test_two_recipes_side_by_side(served: Served, watched: Any, answers: dict[str, str]) -> None:
    one = watched(served.url)
    left, right = (key(answers, f"Who taught the planted wrong capitals ({name}") for name in ("grad_cos", "grad_dot"))
    page = one.open(f"{served.url}#/0/compare?a=0/{left}&b=1/{right}", ".card")
    assert page.get_by_text("are in both").count() == 1
    assert page.locator(".sides section").count() == 4
    assert page.locator(".card.shared").count() > 0
    one.shot("compare")


def test_a_forecast_and_what_is_left_without_its_causes(served: Served, watched: Any, answers: dict[str, str]) -> None:
    one = watched(served.url)
    page = one.open(f"{served.url}#/0/answers/{key(answers, 'What the preferences will do')}", "input[type=range]")
    said = page.get_by_text("Without the 0 of 168 examples")
    assert said.count() == 1
    page.get_by_label("share of the examples taken away").fill("25")
    page.wait_for_selector("text=Without the 42 of 168 examples")
    assert "without=25" in page.url
    one.shot("forecast")


def test_a_question_to_the_model_is_answered_and_kept(served: Served, watched: Any, demo: Path) -> None:
    one = watched(served.url)
    page = one.open(f"{served.url}#/0/ask", "form")
    page.get_by_label("After the prompt").fill("The capital of Peru is")
    page.get_by_label("it says").fill(" Lima")
    page.get_by_label("rather than").fill(" Quito")
    one.shot("ask")
    page.get_by_role("button", name="Ask").click()
    page.wait_for_selector(".card", timeout=120_000)
    assert page.locator("h1").inner_text() == "The capital of Peru is Lima rather than Quito"
    assert "Peru" in page.locator(".card .text").first.inner_text()
    kept = Answers(Ledger(demo / "ledger").storage).listed()
    assert "The capital of Peru is Lima rather than Quito" in [head["title"] for head in kept]


def test_the_keyboard_reaches_the_page(served: Served, watched: Any) -> None:
    page = watched(served.url).open(served.url, ".tree .stage")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    for _ in range(3):
        page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    page.wait_for_function("() => document.activeElement.id === 'main' || document.activeElement.tagName === 'A'")
    unnamed = """[...document.querySelectorAll('button, a, input, select, textarea, svg[role=img], canvas')].filter(
        e => !(e.innerText || e.getAttribute('aria-label') || e.labels?.length || e.title)).map(e => e.outerHTML)"""
    for view in ("ledger", "answers", "examples", "map", "compare", "ask"):
        page.goto(f"{served.url}#/0/{view}")
        page.wait_for_selector(f"body[data-shown^='0/{view}']")
        assert page.evaluate(unnamed) == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_in_both_schemes(served: Served, watched: Any, scheme: str) -> None:
    """Contrast of what is written, at least 4.5 to 1 (WCAG 2.2, 1.4.3)."""
    one = watched(served.url, color_scheme=scheme)
    page = one.open(served.url, ".tree .stage")
    for chosen in ("body", ".sub", ".facts", "#nav a", ".note, figcaption"):
        assert page.evaluate(CONTRAST, chosen) >= 4.5, (scheme, chosen)
    one.shot(f"ledger-{scheme}")


CONTRAST = """(chosen) => {
  const light = (color) => { const [r, g, b] = color.match(/[\\d.]+/g).slice(0, 3).map(v => v / 255).map(v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4); return .2126 * r + .7152 * g + .0722 * b; };
  const text = light(getComputedStyle(document.querySelector(chosen)).color), ground = light(getComputedStyle(document.body).backgroundColor);
  return (Math.max(text, ground) + .05) / (Math.min(text, ground) + .05);
}"""  # noqa: E501


def test_the_report_opens_from_a_file_without_a_network(demo: Path, watched: Any, tmp_path: Path) -> None:
    report = write_report(demo / "ledger", tmp_path / "report.html")
    one = watched(report.as_uri(), offline=True)
    page = one.open(report.as_uri(), ".tree .stage >> nth=2")
    for name, shows in (("Answers", "tbody tr"), ("Examples", ".card"), ("Map", "canvas"), ("Compare", ".card")):
        page.get_by_role("link", name=name, exact=True).click()
        page.wait_for_selector(f"#main {shows}")
    page.get_by_role("link", name="Answers", exact=True).click()
    page.get_by_role("link", name="What each stage did").click()
    page.wait_for_selector("text=one stage after another")
    page.go_back()
    page.get_by_role("link", name="trackstar").click()
    page.get_by_label("Text contains").fill("capital")
    page.wait_for_selector("text=strongest at either end")
    assert page.locator(".card").count() > 0
    assert page.get_by_role("link", name="Ask").count() == 0


@pytest.mark.parametrize("live", [True, False])
def test_hostile_texts_are_shown_and_never_run(watched: Any, tmp_path: Path, live: bool) -> None:
    ledger, _, keys = answered(tmp_path)
    with Served(explorer_of([ledger])) as served:
        root = served.url if live else write_report(ledger, tmp_path / "r.html", HOSTILE[0]).as_uri()
        one = watched(root)
        page = one.open(f"{root}#/0/examples", ".card")
        texts = "\n".join(page.locator(".card .text").all_inner_texts())
        for text in HOSTILE[:3]:
            assert text in texts
        assert "a NUL ␀ byte" in texts
        assert "\u202e" not in texts
        assert "1,000,000" not in texts  # cut before it reaches the page
        assert "longlong" in texts
        for name in keys.values():
            page.goto(f"{root}#/0/answers/{name}")
            page.wait_for_selector(f"body[data-shown='0/answers/{name}']")
            assert page.locator("h1").count() == 1
        page.goto(f"{root}#/0/answers/<img src=x onerror=alert(1)>")
        page.wait_for_selector(".error")
        if live:  # the browser itself tells of an address that is refused
            assert [text for text in one.wrong if "status of 400" in text] == one.wrong
            one.wrong.clear()
        assert "owned" not in page.title().replace(HOSTILE[0], "").replace("document.title = 'owned'", "")
        assert page.locator("main script, main img, main iframe").count() == 0
        page.goto("about:blank")
