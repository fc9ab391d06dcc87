"""A real browser. These tests are a step of their own in CI: ``pytest tests/browser`` with the extra ``browser`` and
Debian's chromium."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

try:
    from playwright import sync_api
except ImportError:
    sync_api, collect_ignore_glob = None, ["test_*.py"]
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
SWITCHES = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
            "--disable-component-update", "--disable-sync"]  # fmt: skip
# Where screenshots go, to be looked at; none are taken without it.
SHOTS = os.environ.get("SCREENSHOTS")


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    if not CHROMIUM:
        pytest.skip("no chromium")
    assert sync_api is not None
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=SWITCHES)
        yield browser
        browser.close()


class Watched:
    """A page whose console and requests are watched."""

    def __init__(self, page: Any, allowed: str) -> None:
        self.page, self.wrong, self._allowed = page, list[str](), allowed
        page.on("console", lambda said: said.type == "error" and self.wrong.append(said.text))
        page.on("pageerror", lambda error: self.wrong.append(str(error)))
        page.on("request", self._asked)
        page.on("dialog", lambda dialog: self.wrong.append(f"dialog {dialog.message}") or dialog.dismiss())

    def _asked(self, request: Any) -> None:
        if not request.url.startswith((self._allowed, "data:", "blob:")):
            self.wrong.append(f"asked {request.url}")

    def open(self, address: str, wait: str) -> Any:
        """Go to a page, and wait for what it shows."""
        self.page.goto(address)
        self.page.wait_for_selector(wait)
        return self.page

    def shot(self, name: str) -> None:
        """A picture of it."""
        if SHOTS:
            Path(SHOTS).mkdir(parents=True, exist_ok=True)
            self.page.screenshot(path=f"{SHOTS}/{name}.png")


@pytest.fixture
def watched(browser: Any) -> Iterator[Any]:
    """Makes pages; afterwards, nothing may have been wrong on any of them."""
    pages: list[Watched] = []

    def make(allowed: str, **settings: Any) -> Watched:
        context = browser.new_context(viewport={"width": 1240, "height": 900}, accept_downloads=True, **settings)
        pages.append(Watched(context.new_page(), allowed))
        return pages[-1]

    yield make
    wrong = [text for one in pages for text in one.wrong]
    for one in pages:
        one.page.context.close()
    assert not wrong
