"""The documentation site builds, shows every page, loads nothing from another host, and its links lead somewhere."""

from __future__ import annotations

import importlib.util
import re
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from urllib.parse import unquote, urlsplit

import pytest

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
LOADING = {  # what a browser fetches without being asked; links in the text are not among it
    ("script", "src"), ("img", "src"), ("img", "srcset"), ("source", "src"), ("source", "srcset"), ("iframe", "src"),
    ("embed", "src"), ("object", "data"), ("video", "src"), ("video", "poster"), ("audio", "src"), ("track", "src"),
    ("input", "src"), ("use", "href"), ("image", "href"), ("form", "action"), ("link", "href"), ("base", "href"),
}  # fmt: skip
ELSEWHERE = re.compile(r"^\s*(?:[a-z][a-z0-9+.-]*:)?//", re.IGNORECASE)
FETCHED_BY_STYLE = re.compile(r"""url\(\s*["']?([^"')]+)|@import\s+["']([^"']+)""")
ALLOWED_SOURCES = {"'self'", "'none'", "'unsafe-inline'", "file:", "data:", "blob:"}


@dataclass
class Page(HTMLParser):
    """What a built page loads, links to, can be linked at, and says."""

    path: Path
    loads: list[str] = field(default_factory=list)
    links: list[str] = field(default_factory=list)
    anchors: set[str] = field(default_factory=set)
    classes: set[str] = field(default_factory=set)
    policy: str = ""
    paragraphs: list[str] = field(default_factory=list)
    text: str = ""
    inside: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()
        self.text = self.path.read_text()
        self.feed(self.text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        for name, value in given.items():
            if (tag, name.removeprefix("xlink:")) in LOADING:
                self.loads.append(value)
            if name == "style":
                self.loads += fetched_by_style(value)
        self.anchors |= {given[name] for name in ("id", "name") if name in given}
        self.classes |= {*given.get("class", "").split()}
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        if tag == "meta" and given.get("http-equiv", "").lower() == "content-security-policy":
            self.policy = given["content"]
        if tag in ("p", "style"):
            self.inside.append(tag)
        if tag == "p":
            self.paragraphs.append("")

    def handle_endtag(self, tag: str) -> None:
        if self.inside and self.inside[-1] == tag:
            self.inside.pop()

    def handle_data(self, data: str) -> None:
        if "style" in self.inside:
            self.loads += fetched_by_style(data)
        elif "p" in self.inside:
            self.paragraphs[-1] += data


def fetched_by_style(text: str) -> list[str]:
    return [first or second for first, second in FETCHED_BY_STYLE.findall(text)]


def builder() -> ModuleType:
    spec = importlib.util.spec_from_file_location("build_site", DOCS / "build_site.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("zensical", reason="the extra `docs` is not installed")
    return builder().build(tmp_path_factory.mktemp("documentation") / "built")


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, Page]:
    return {path: Page(path) for path in sorted(site.rglob("*.html"))}


def test_pages_load_nothing_from_another_host(pages):
    for path, page in pages.items():
        assert not [load for load in page.loads if ELSEWHERE.match(load)], path
        assert page.loads, "a page without style sheet was not parsed"


def test_style_sheets_load_nothing_from_another_host(site):
    sheets = sorted(site.rglob("*.css"))
    assert sheets
    for sheet in sheets:
        assert not [load for load in fetched_by_style(sheet.read_text()) if ELSEWHERE.match(load)], sheet


def test_scripts_cannot_load_from_another_host(pages):
    """The theme's script holds addresses of viewers that it fetches where a page asks for one. No page does, and each
    forbids it."""
    for path, page in pages.items():
        sources = {source for rule in page.policy.split(";") for source in rule.split()[1:]}
        assert "default-src" in page.policy, path
        assert sources <= ALLOWED_SOURCES, path
        assert not page.classes & {"mermaid", "glightbox", "pyodide", "md-source"}, path


def test_links_lead_somewhere(site, pages):
    checked = 0
    for path, page in pages.items():
        if path.name == "404.html":
            continue  # its links are of the host's root
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                assert parts.scheme == "https", f"{path}: {link}"
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            target = target / "index.html" if target.is_dir() else target
            assert target.is_relative_to(site), f"{path}: {link}"
            assert target.is_file(), f"{path}: {link}"
            if parts.fragment and target.suffix == ".html":
                assert unquote(parts.fragment) in pages[target].anchors, f"{path}: {link}"
            checked += 1
    assert checked > 100


def test_every_page_is_in_the_navigation():
    listed = re.findall(r": (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert len(listed) == len({*listed})
    written = {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")}
    assert {path for path in listed if not path.startswith("repository/")} == written


def test_every_page_of_the_navigation_is_built(site):
    for path in re.findall(r": (\S+)\.md$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE):
        assert (site / f"{path.removesuffix('README')}{'index' if path.endswith('README') else ''}.html").is_file()


def test_lists_and_tables_are_not_shown_as_text(pages):
    """Markdown of the site wants an empty line before them, other renderers do not."""
    for path, page in pages.items():
        for paragraph in page.paragraphs:
            assert not re.search(r"^\s*(- |\d\. |\||```)", paragraph, re.MULTILINE), f"{path}: {paragraph}"


def test_a_link_that_leads_nowhere_ends_the_build(tmp_path, monkeypatch):
    module = builder()
    (tmp_path / "docs" / "theme").mkdir(parents=True)
    (tmp_path / "mkdocs.yml").write_text("site_name: x\n")
    (tmp_path / "data.json").write_text("{}")
    page = tmp_path / "docs" / "page.md"
    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(module, "DOCS", tmp_path / "docs")
    page.write_text("[data](../data.json)\n\n```\n[code](nothing.md)\n```\n")
    module.stage(tmp_path / "out")
    assert "](repository/data.json)" in (tmp_path / "out" / "docs" / "page.md").read_text()
    assert (tmp_path / "out" / "docs" / "repository" / "data.json").read_text() == "{}"
    for wrong in ("nothing.md", "../../outside.md"):
        page.write_text(f"[a page]({wrong})")
        with pytest.raises(SystemExit, match=re.escape(wrong)):
            module.stage(tmp_path / "out")


def test_other_folders_are_not_replaced(tmp_path):
    (tmp_path / "thesis.txt").write_text("the only copy")
    with pytest.raises(SystemExit, match="something else"):
        builder().stage(tmp_path)
    assert (tmp_path / "thesis.txt").exists()
