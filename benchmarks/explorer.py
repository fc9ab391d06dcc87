"""The explorer on a large ledger, in a real browser: how long until a page is there, how long until a filter answers.

Times are what a reader waits, in milliseconds on this machine, because what is wanted of them is absolute: first paint
under two seconds, a filter's answer under 300 ms. A filter waits 120 ms for more typing before it asks; that is in its
time. Needs the extra ``browser`` and Debian's chromium.
"""

from __future__ import annotations

import random
import shutil
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import report
import torch
from torch import nn

from trainer_attrib import Analyzer, Behavior, Recorder, SketchConfig
from trainer_attrib.analysis.keeping import keep
from trainer_attrib.explorer.serving import Served, explorer_of

WIDTH, BATCH = 16, 500
WORDS = (
    "the", "of", "and", "a", "to", "in", "is", "light", "bread", "water", "stone", "river", "market", "engine",
    "letter", "number", "colour", "winter", "garden",
)  # fmt: skip
SWITCHES = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
            "--disable-component-update", "--disable-sync"]  # fmt: skip
SOURCES = ("web", "books", "code", "dialogue")


def recorded(folder: Path, examples: int) -> tuple[Path, nn.Module]:
    """One epoch of a small network over texts of about 300 characters."""
    torch.manual_seed(0)
    draw = random.Random(0)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    sketch = SketchConfig(rank=8, correction="none")
    with Recorder(folder / "ledger", stage="one", model=model, optimizer=optimizer, sketch=sketch) as recorder:
        for first in range(0, examples, BATCH):
            ids = [f"example-{first + row}" for row in range(BATCH)]
            texts = [" ".join(draw.choices(WORDS, k=50)) for _ in range(BATCH)]
            sources = [draw.choice(SOURCES) for _ in range(BATCH)]
            optimizer.zero_grad()
            with recorder.batch(ids, sources=sources, texts=texts, denominator=BATCH):
                x, y = torch.randn(BATCH, WIDTH), torch.randint(0, 4, (BATCH,))
                nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
    return folder / "ledger", model


def answered(ledger: Path, model: nn.Module) -> str:
    """An influence of all examples on five queries; returns its key."""
    behavior = Behavior.margin("margin", torch.randn(5, WIDTH), [0, 1, 2, 3, 0])
    found = Analyzer(ledger, model).influence([behavior], recipe="grad_cos", controls=())
    return keep(ledger, found, title="Who did it")


def painted(page: Any, address: str, shows: str, mark: str = "page-shown") -> tuple[float, float]:
    """First paint and the moment at which the page's content was there, milliseconds after a fresh visit began."""
    page.goto("about:blank")
    page.goto(address)
    page.wait_for_selector(shows)
    paint = page.evaluate("performance.getEntriesByName('first-contentful-paint')[0]?.startTime ?? NaN")
    return float(paint), float(page.evaluate(f"performance.getEntriesByName('{mark}').at(-1).startTime"))


def filtered(page: Any, label: str, value: str, told: str) -> float:
    """Milliseconds from the last letter until the page tells of the answer."""
    page.evaluate(WAIT, told)
    box = page.get_by_label(label, exact=True)
    box.evaluate(TYPED, value) if box.evaluate("e => e.tagName") == "INPUT" else box.select_option(value)
    return float(page.evaluate("window.answered"))


# The clock runs inside the page: from the event to the change of what is told, and the frame in which it is drawn.
WAIT = """(told) => { window.answered = new Promise((resolve) => {
  const place = document.querySelector(told), before = place.textContent;
  let began;
  for (const kind of ['input', 'change']) addEventListener(kind, () => { began ??= performance.now(); }, { capture: true, once: true });
  new MutationObserver((_, observer) => { if (began && place.textContent !== before) { observer.disconnect();
    requestAnimationFrame(() => setTimeout(() => resolve(performance.now() - began))); } }).observe(place, { childList: true, characterData: true, subtree: true });
}); }"""  # noqa: E501
TYPED = "(e, value) => { e.value = value; e.dispatchEvent(new Event('input', { bubbles: true })); }"


def main() -> None:
    """Record, serve, look."""
    options = report.parser((__doc__ or "").splitlines()[0]).parse_args()
    chromium = shutil.which("chromium")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        chromium = None
    if not chromium:
        sys.exit("needs chromium (apt-get install chromium) and pip install 'trainer-attrib[browser]'")
    examples, repeats = (10_000, 2) if options.quick else (100_000, 5)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        ledger, model = recorded(Path(folder), examples)
        key = answered(ledger, model)
        began = time.perf_counter()
        with Served(explorer_of([ledger])) as served, sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=chromium, args=SWITCHES)
            page = browser.new_page(viewport={"width": 1240, "height": 900})
            painted(page, served.url, ".stage")
            rows.append({"what": "server start and first visit", "ms": round(1000 * (time.perf_counter() - began))})
            views = {"ledger": ("#/0/ledger", ".stage"), "examples": ("#/0/examples", ".card"),
                     "map": ("#/0/map/one", "canvas"), "answer": (f"#/0/answers/{key}", ".card")}  # fmt: skip
            for name, (address, shows) in views.items():
                found = np.array([painted(page, served.url + address, shows) for _ in range(repeats + 1)])
                rows.append({"what": f"{name}: first visit, content there", "ms": round(float(found[0, 1]))})
                rows.append({"what": f"{name}: first paint", "ms": round(float(np.nanmedian(found[1:, 0])))})
                rows.append({"what": f"{name}: content there", "ms": round(float(np.median(found[1:, 1])))})
            for name, address, told in (
                ("examples", "#/0/examples", ".told"), ("answer", f"#/0/answers/{key}", ".told")
            ):  # fmt: skip
                painted(page, served.url + address, ".card")
                times: dict[str, list[float]] = {}
                for repeat in range(repeats):
                    for what, label, value in (
                        ("text", "Text contains", f"{WORDS[repeat]} garden"),
                        ("source", "Source", f"={SOURCES[repeat % 4]}"),
                        ("steps", "From step", str(10 + repeat)),
                    ):  # fmt: skip
                        times.setdefault(what, []).append(filtered(page, label, value, told))
                rows += [
                    {"what": f"{name}: filter by {what}", "ms": round(median(all_))} for what, all_ in times.items()
                ]
            browser.close()
    paints = [row["ms"] for row in rows if "first paint" in row["what"]]
    filters = [row["ms"] for row in rows if "filter by" in row["what"]]
    checks = {
        "slowest first paint, ms": report.check(max(paints), 2000),
        "slowest filter, ms": report.check(max(filters), 300),
    }
    report.publish(
        "explorer", rows, checks, quick=options.quick, notes=[f"{examples:,} examples of about 300 characters"]
    )


if __name__ == "__main__":
    main()
