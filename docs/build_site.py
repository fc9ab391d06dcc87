"""Builds the documentation site with zensical.

``pip install -c constraints.txt torch==2.13.0 '.[docs]' && python docs/build_site.py``

Pages link to files of the repository that are not below docs/ (results, examples, the README). What is linked goes into
the site under ``repository/``, and a link that leads nowhere ends the build.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
COPIED = {".md", ".png", ".svg"}
LINK = re.compile(r"(?<=\]\()(?!https?:|mailto:|#)([^)\s#]+)(?=[)#])")
FENCE = re.compile(r"(^```.*?^```)", re.DOTALL | re.MULTILINE)


def stage(folder: Path) -> None:
    """Copy mkdocs.yml, the theme's one change and all that the site shows into a folder that zensical can build."""
    if folder.exists() and any(folder.iterdir()) and not (folder / "mkdocs.yml").exists():
        raise SystemExit(f"{folder} holds something else than a site; name another folder.")
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(DOCS / "theme", folder / "theme")
    shutil.copy(ROOT / "mkdocs.yml", folder / "mkdocs.yml")
    waiting = [path for path in sorted(DOCS.rglob("*")) if path.suffix in COPIED]
    done: set[Path] = set()
    while waiting:
        if (path := waiting.pop()) in done:
            continue
        done.add(path)
        target = folder / "docs" / place(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".md":
            text, linked = _relinked(path)
            target.write_text(text)
            waiting += linked
        else:
            shutil.copy(path, target)


def place(path: Path) -> Path:
    """Where a file of the repository is in the site's sources."""
    return path.relative_to(DOCS) if path.is_relative_to(DOCS) else "repository" / path.relative_to(ROOT)


def _relinked(page: Path) -> tuple[str, list[Path]]:
    """A page with links as they are in the site, and the files that they lead to. Code is left as it is."""
    linked: list[Path] = []

    def relinked(link: re.Match[str]) -> str:
        found = (page.parent / link[1]).resolve()
        found = found / "README.md" if found.is_dir() else found
        if not found.is_file() or not found.is_relative_to(ROOT):
            raise SystemExit(f"{page.relative_to(ROOT)} links to {link[1]}, where there is no file of this repository.")
        linked.append(found)
        return Path(os.path.relpath(place(found), place(page).parent)).as_posix()

    parts = FENCE.split(page.read_text())  # text, code, text, ...
    return "".join(part if i % 2 else LINK.sub(relinked, part) for i, part in enumerate(parts)), linked


def build(folder: Path) -> Path:
    """Stage and build; returns the folder of the site."""
    stage(folder)
    zensical = [sys.executable, "-m", "zensical", "build", "--strict", "--clean", "-f", str(folder / "mkdocs.yml")]
    subprocess.run(zensical, check=True, cwd=folder)
    return folder / "site"


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    arguments.add_argument(
        "--out", type=Path, default=ROOT / "build" / "documentation", help="replaced, if it is there"
    )
    print(build(arguments.parse_args().out.resolve()) / "index.html")
