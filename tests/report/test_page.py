from __future__ import annotations

import re

import pytest

from trainer_attrib.report.blocks import (
    Bar,
    Bars,
    Curve,
    Curves,
    Example,
    Grid,
    Notes,
    Ranking,
    Rankings,
)
from trainer_attrib.report.charts import curve_svg, shown
from trainer_attrib.report.page import page, write_page

HOSTILE = "<script>alert(1)</script>\"'&\x00\u202e<img src=x onerror=alert(1)>"


def hostile_blocks():
    example = Example(0.5, HOSTILE, HOSTILE, 3, HOSTILE, HOSTILE)
    tokens = Example(0.5, "", "", 3, "", "", [(HOSTILE, 0.0), (HOSTILE, -0.2), (HOSTILE, 0.1)])
    return [
        Notes(HOSTILE, [HOSTILE]),
        Grid(HOSTILE, [HOSTILE], [[HOSTILE], [1.5], [2], [True], [None]], HOSTILE),
        Bars(HOSTILE, [Bar(HOSTILE, HOSTILE, -1.0, 0.3, False), Bar(HOSTILE, "b", 2.0)], HOSTILE, HOSTILE),
        Curves(HOSTILE, [Curve(HOSTILE, [1, 2, 3], [3.0, float("nan"), 1.0])], HOSTILE),
        Rankings(HOSTILE, [Ranking(HOSTILE, [example], [example, tokens])], HOSTILE),
    ]


def test_hostile_text_is_shown_never_run():
    html = page(HOSTILE, hostile_blocks(), HOSTILE)
    assert "<script" not in html
    assert "<img" not in html
    assert "\x00" not in html
    assert "\u202e" not in html
    assert html.count("&lt;script&gt;") >= 15


def test_the_page_asks_nobody_for_anything():
    html = page("t", hostile_blocks())
    assert "default-src 'none'" in html
    assert not re.search(r"(src|href)\s*=|url\(|@import|https?://", re.sub(r"&lt;.*?&gt;", "", html))


def test_tokens_are_colored_by_their_share_of_the_strongest():
    tokens = [("first", 0.0), (" good", 0.5), (" bad", -2.0), (" <b>", 1e-9)]
    html = page("t", [Rankings("r", [Ranking("q", [Example(1.0, "e", "s", 0, "", "unused", tokens)], [])])])
    assert '<p class="text">first<span class="up" style="--w:0.25" title="+0.5"> good</span>' in html
    assert '<span class="down" style="--w:1.00" title="-2"> bad</span>' in html
    assert '<span class="up" style="--w:0.00" title="+1e-09"> &lt;b&gt;</span></p>' in html
    assert "unused" not in html


def test_an_unfinished_page_never_replaces_a_finished_one(tmp_path, monkeypatch):
    path = write_page(tmp_path / "deep" / "report.html", "first", [])
    monkeypatch.setattr("trainer_attrib.report.page.page", lambda *a: (_ for _ in ()).throw(RuntimeError("broken")))
    with pytest.raises(RuntimeError, match="broken"):
        write_page(path, "second", [])
    assert "first" in path.read_text()


def test_empty_blocks_leave_no_headings():
    assert "<h2>" not in page("t", [Notes("Empty", [])])


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.123456, "0.1235"), (12345.6, "12,346"), (3, "3"), (True, "yes"), (None, ""), (float("nan"), "n/a")],
)
def test_numbers_are_shown_shortly(value, text):
    assert shown(value) == text


def test_a_curve_of_one_point_is_no_curve():
    assert curve_svg(Curve("c", [1], [2.0])) == ""
