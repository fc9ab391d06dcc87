"""The page around the views: the same for the live explorer and for the one-file report."""

from __future__ import annotations

import base64
import hashlib
import json
from functools import cache
from importlib import resources
from string import Template
from typing import Any

from trainer_attrib.report.escape import escaped

SCRIPTS = (
    "vendor/d3.min.js", "vendor/plot.min.js", "dom.js", "data.js", "charts.js", "texts.js", "exports.js", "filters.js",
    "view_ledger.js", "view_effects.js", "view_influence.js", "view_forecast.js", "view_blocks.js", "view_answers.js",
    "view_examples.js", "view_map.js", "view_compare.js", "view_ask.js", "main.js",
)  # fmt: skip
"""In the order in which they run."""
STYLE = "page.css"


def _policy(styles: str, scripts: str, more: str = "") -> str:
    """Charts bring style elements of their own, hence 'unsafe-inline' for styles; no script is allowed by that."""
    return f"default-src 'none'; script-src {scripts}; style-src {styles}; img-src data:;{more} {_NOTHING_ELSE}"


_NOTHING_ELSE = "base-uri 'none'; form-action 'none'"
LIVE_POLICY = _policy("'self' 'unsafe-inline'", "'self'", " connect-src 'self';")


@cache
def asset(name: str) -> str:
    """A file of the page."""
    return resources.files("trainer_attrib.explorer").joinpath("assets", name).read_text(encoding="utf-8")


def live_page(token: str) -> str:
    """The page of the server, which loads its parts from there.

    Args:
        token: that requests must carry which start or stop work.
    """
    scripts = "".join(f'<script src="/assets/{name}" defer></script>' for name in SCRIPTS)
    return _page("trainer-attrib", f'<link rel="stylesheet" href="/assets/{STYLE}">', scripts, LIVE_POLICY, token)


def one_file(title: str, bundle: dict[str, Any]) -> str:
    """The page with everything in it, which loads nothing.

    Args:
        title: in the window's title.
        bundle: address -> data, all that can be looked at.
    """
    sources = [asset(name).strip() for name in SCRIPTS]
    # A closing tag inside a script's text would end it.
    data = json.dumps(bundle, ensure_ascii=True, allow_nan=False).replace("<", "\\u003c")
    scripts = f'<script type="application/json" id="bundle">{data}</script>'
    scripts += "".join(f"<script>{source}</script>" for source in sources)
    policy = _policy("'unsafe-inline'", " ".join(f"'sha256-{_sha256(source)}'" for source in sources))
    return _page(title, f"<style>{asset(STYLE)}</style>", scripts, policy, "")


def _page(title: str, style: str, scripts: str, policy: str, token: str) -> str:
    return Template(asset("page.html")).substitute(
        title=escaped(title), style=style, scripts=scripts, policy=escaped(policy), token=escaped(token)
    )


def _sha256(source: str) -> str:
    return base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()
