"""Every answer shows itself in a notebook: as HTML in which no text is code, and as a figure."""

from __future__ import annotations

import importlib
import pkgutil
import re
from typing import Any

import numpy as np
import pytest
import torch

import trainer_attrib.analysis
from trainer_attrib.analysis.beside import by_chance
from trainer_attrib.analysis.calibration import Calibration, Candidate
from trainer_attrib.analysis.checking import Check
from trainer_attrib.analysis.forecasting.features import FeatureLean, FeatureView
from trainer_attrib.analysis.forecasting.forecast import Forecast
from trainer_attrib.analysis.forecasting.plan import Plan
from trainer_attrib.analysis.forecasting.reshaping import Reshaping
from trainer_attrib.analysis.forecasting.results import Contributions, Shift, Shifts
from trainer_attrib.analysis.forecasting.run import TrainingRow
from trainer_attrib.analysis.influence_results import Influence, InfluenceExamples, TokenScores
from trainer_attrib.analysis.recipes.products import GradCos
from trainer_attrib.analysis.removal import Removal, RemovalPoint
from trainer_attrib.analysis.results import Effect, Interaction, Result, StageEffects
from trainer_attrib.analysis.self_influence import SelfInfluence, SelfScore
from trainer_attrib.analysis.suspects import Suspects
from trainer_attrib.analysis.verification import Outcome, Verification
from trainer_attrib.evaluation.tail_patch import TailPatch
from trainer_attrib.report.page import page

matplotlib = pytest.importorskip("matplotlib")
H = "<script>alert(1)</script>\x00\u202e$\\frac{$ <img src=x>\n&"


@pytest.fixture(autouse=True)
def no_window(monkeypatch: pytest.MonkeyPatch) -> Any:
    from matplotlib import pyplot

    pyplot.switch_backend("agg")
    yield
    pyplot.close("all")


def influence() -> Influence:
    examples = InfluenceExamples(np.array([H] * 3), np.array([H, H + "2", "c"]), np.array([1, 2, 3]), [H] * 3, [H] * 3)
    scores = np.array([[0.5, -0.5, 0.1], [0.1, 0.2, 0.3]], np.float32)
    tokens = {(0, 0): TokenScores((H, "b"), np.array([0.5, -0.1]))}
    beside = (by_chance(2, 3, 2),)
    return Influence((H, H), (H, "q2"), scores, examples, H, (H,), beside, tokens)


def shifts(kind: type[Shifts] = Shifts) -> Any:
    row = Shift(H, H, 0.1, 0.5, 0.1, 0.01, H, H, 0.9, float("nan"), 0.3)
    return kind((row, Shift("b", "frozen", 0.1, -0.5, 0.1, 0.01, "lazy", "mean", 0.9, 0.2, 0.3)), (H,))


def suspects() -> Suspects:
    found = Suspects.of(influence(), k=1)
    assert found.rows
    return found


def patch() -> TailPatch:
    return TailPatch(
        {H: np.array([[0.1, 0.2], [0.3, 0.1]]), "random": np.zeros((2, 2))},
        {H: np.array([0.2, 0.3]), "random": np.zeros(2)}, H,
    )  # fmt: skip


def point(scale: float) -> RemovalPoint:
    return RemovalPoint(scale, scale, (-scale,), True)


INSTANCES: dict[type[Result], Any] = {
    StageEffects: lambda: StageEffects(
        (Effect(H, H, H, H, H, 1.0, 0.1, True, 0.0), Effect(H, H, "sft", H, H, -1.0, 9.0, False, 0.0)), (H,),
        (Interaction(H, H, 1.0, 0.5),),
    ),
    Influence: influence,
    Check: lambda: Check(H, 2, {(H, H): patch()}, (H,)),
    Suspects: suspects,
    SelfInfluence: lambda: SelfInfluence(
        H, "plain", (SelfScore(1, H, 2.0, 1, H, H), SelfScore(2, "b", 1.0, 1, None, None)), (H,)
    ),
    Calibration: lambda: Calibration(
        H, GradCos(), (Candidate(H, {H: 1.0}, 0.5, 0.0, 0.1), Candidate("b", {}, 0.6, 0.1, 0.01)), 4, 2, (H,)
    ),
    Verification: lambda: Verification(
        H, 2, 10, 0.0, (Outcome("error", H, H, 0.0, 1.0, 1.0, 0.2, 0.9, H), Outcome("other", "b", "q", *[1.0] * 5, "")),
        (H,),
    ),
    Removal: lambda: Removal(
        H, H, (H,), (H,), point(1.0), (point(0.0), point(0.5), point(1.0)), {"w": torch.zeros(1).double()}, (H,)
    ),
    Contributions: lambda: Contributions(
        (H, "b"), (TrainingRow(H, H, H, H), TrainingRow("b", None, "", "text")), np.array([[0.5, -0.5], [0.1, 0.2]]),
        (H,),
    ),
    Shifts: shifts,
    Forecast: lambda: shifts(Forecast),
    Reshaping: lambda: Reshaping(Plan.keeping([H, "b"]), H, shifts(), shifts(), (H,)),
    FeatureView: lambda: FeatureView((FeatureLean(H, 12, 3, H, 0.4, 0.3, 5.0, 0.01, H),), (0,) * 12, (H,)),
}  # fmt: skip


def subclasses(kind: type) -> set[type]:
    return {below for own in kind.__subclasses__() for below in {own, *subclasses(own)}}


def every_result() -> list[type[Result]]:
    """All that are defined anywhere in the analysis, whether this file knows them or not."""
    for module in pkgutil.walk_packages(trainer_attrib.analysis.__path__, "trainer_attrib.analysis."):
        importlib.import_module(module.name)
    found = {kind for kind in subclasses(Result) if kind.__module__.startswith("trainer_attrib.")}
    return sorted(found, key=lambda kind: kind.__name__)


every = pytest.mark.parametrize("kind", every_result(), ids=lambda kind: kind.__name__)


@every
def test_it_has_both_and_this_file_makes_one(kind: type[Result]) -> None:
    assert kind.blocks is not Result.blocks, "without blocks it has no HTML"
    assert kind.plot is not Result.plot
    assert "matplotlib figure" in (kind.plot.__doc__ or "")
    assert kind in INSTANCES, "add a small one to INSTANCES"


@every
def test_its_html_shows_hostile_text_and_runs_none(kind: type[Result]) -> None:
    html = INSTANCES[kind]()._repr_html_()
    assert "&lt;script&gt;alert(1)" in html
    assert not re.search(r"<(script|img)", html)
    assert "\x00" not in html
    assert "\u202e" not in html
    assert "␀" in html
    assert html.count("<div") == html.count("</div>")


@every
def test_its_figure_can_be_drawn_whatever_the_text(kind: type[Result]) -> None:
    """Drawn too: formulas between dollar signs and characters without a glyph only fail then."""
    figure = INSTANCES[kind]().plot()
    assert isinstance(figure, matplotlib.figure.Figure)
    figure.canvas.draw()
    data = [line for axis in figure.axes for line in axis.lines if line.get_transform() == axis.transData]  # no axhline
    assert data or any(axis.patches for axis in figure.axes)
    texts = [text.get_text() for text in figure.findobj(matplotlib.text.Text)]
    assert not any(c in text for text in texts for c in "\x00\u202e\n")


@every
def test_a_notebook_keeps_its_looks(kind: type[Result]) -> None:
    """The page's rules apply inside the result only: all are nested in its class."""
    html = INSTANCES[kind]()._repr_html_()
    [style] = re.findall(r"<style>(.*?)</style>", html, re.DOTALL)
    assert html.startswith('<div class="trainer-attrib"><style>.trainer-attrib {')
    assert style.count("{") == style.count("}") > 20
    depth, outside = 0, ""
    for character in style:
        depth += {"{": 1, "}": -1}.get(character, 0)
        assert depth >= 0
        outside += character if depth == 0 else ""
    assert outside.replace("}", "").strip() == ".trainer-attrib"
    assert not re.search(r"(:root|body|main)\s*\{", style)
    assert "--fg" in style


def test_a_page_has_its_own_rules() -> None:
    assert ":root {" in page("t", influence().blocks())


def test_bars_of_one_name_stay_apart() -> None:
    names = ["a" * 70 + end for end in "xy"]  # the same where a label is cut
    rows = tuple(Shift(name, "m", 0.0, 1.0, 0.1, 0.0, "lazy", "mean", 1.0, 0.0, 0.0) for name in names)
    [axis] = Shifts(rows).plot().axes
    assert sorted(patch.get_y() for patch in axis.patches) == pytest.approx([-0.35, 0.65])
