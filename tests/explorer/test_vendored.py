"""Libraries of the page are the published files, with their licences."""

from __future__ import annotations

import hashlib
import json
import re
from importlib import resources

from trainer_attrib.explorer.shell import SCRIPTS, asset

ASSETS = resources.files("trainer_attrib.explorer").joinpath("assets")

DANGEROUS = ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "new Function", ".html(")


def test_vendored_files_are_what_was_published():
    told = json.loads(asset("vendor/vendored.json"))
    files = {p.name for p in ASSETS.joinpath("vendor").iterdir() if p.name.endswith(".js")}
    assert files == told.keys()
    for name, one in told.items():
        content = ASSETS.joinpath("vendor", name).read_bytes()
        assert hashlib.sha256(content).hexdigest() == one["sha256"]
        licence = asset(f"vendor/{name.split('.')[0]}.LICENSE")
        assert "Permission to use, copy, modify" in licence  # ISC


def test_every_script_is_used_and_none_makes_html_of_text():
    own = sorted(p.name for p in ASSETS.iterdir() if p.name.endswith(".js"))
    assert own == sorted(name for name in SCRIPTS if not name.startswith("vendor/"))
    for name in own:
        code = asset(name)
        for dangerous in (
            "innerHTML",
            "outerHTML",
            "insertAdjacentHTML",
            "document.write",
            "eval(",
            "new Function",
            ".html(",
        ):
            assert dangerous not in re.sub(r"//.*", "", code), (name, dangerous)
        assert not re.search(r"https?://", re.sub(r"http://www\.w3\.org", "", code)), name
