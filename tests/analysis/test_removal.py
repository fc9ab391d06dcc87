"""Taking a stage out of the weights: what is tried, what is chosen, what is left alone."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.analysis.looped import Looped, network, weights_of
from tests.analysis.stages import margins
from trainer_attrib.analysis.effects.replay import Replay
from trainer_attrib.errors import ConfigurationError, NotComparableError


def test_removing_by_retraining_at_full_scale_is_training_without_the_stage(tmp_path: Path) -> None:
    run = Looped()
    analyzer = run.analyzer(tmp_path, network(norm=False))
    removal = analyzer.remove("second", [margins()], method="retrain", programs=run.programs, scales=[1.0])
    assert [point.scale for point in removal.points] == [0, 1]
    without = weights_of(run.without("second").train(network(norm=False)))
    with_it = weights_of(analyzer.model)
    for name, change in removal.displacement.items():
        expected = without[name] - with_it[name] if removal.chosen.scale else torch.zeros(())
        torch.testing.assert_close(change, expected.expand_as(change), rtol=0, atol=1e-14)
    full = next(point for point in removal.points if point.scale == 1)
    model = network(norm=False)
    model.load_state_dict(without)
    assert full.improved == pytest.approx(float(margins().values(model).mean()), abs=1e-12)


def test_the_last_stage_is_removed_exactly_by_any_method(tmp_path: Path) -> None:
    run = Looped()
    analyzer = run.analyzer(tmp_path, network(norm=False))
    start = analyzer.lineage[-1].snapshot("start")
    for method in ("subtract", "replay"):
        removal = analyzer.remove("third", [margins()], method=method, programs=run.programs, scales=[-1.0, 1.0])
        sign = removal.chosen.scale
        for name, change in removal.displacement.items():
            expected = sign * (start[name] - dict(analyzer.model.named_parameters())[name].detach())
            torch.testing.assert_close(change, expected, rtol=0, atol=1e-14)


def test_the_worst_group_improves_and_what_is_kept_is_kept(tmp_path: Path) -> None:
    run = Looped()
    analyzer = run.analyzer(tmp_path, network(norm=False))
    before = weights_of(analyzer.model)
    groups = [margins("a", 1), margins("b", 2)]
    kept = replace(groups[0], name="kept", measure=lambda model, items: -groups[0].measure(model, items))
    removal = analyzer.remove("first", groups, [kept], programs=run.programs, tolerance=0.3)
    assert {name: w.tolist() for name, w in weights_of(analyzer.model).items()} == {
        name: w.tolist() for name, w in before.items()
    }
    edited = removal.apply(copy.deepcopy(analyzer.model))
    means = [float(group.values(edited).mean()) for group in groups]
    assert removal.chosen.improved == pytest.approx(min(means), abs=1e-12)
    assert removal.chosen.kept[0] == pytest.approx(float(kept.values(edited).mean()), abs=1e-12)
    assert removal.chosen.kept[0] >= removal.before.kept[0] - 0.3
    allowed = [point.improved for point in removal.points if point.allowed]
    assert removal.chosen.improved == max(allowed) > removal.before.improved
    assert all(point.allowed is (point.kept[0] >= removal.before.kept[0] - 0.3) for point in removal.points)


def test_removals_render_as_table_text_page_and_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib").use("Agg")
    run = Looped()
    analyzer = run.analyzer(tmp_path, network())
    removal = analyzer.remove("first", [margins()], [margins("kept", 3)], method=Replay(4, 4), programs=run.programs)
    assert removal.to_table().column_names == ["scale", "improved", "allowed", "kept"]
    assert removal.to_dict()["method"] == "replay"
    assert "chosen" in repr(removal)
    assert "buffers" in repr(removal)
    assert "Removing stage first" in removal.report(tmp_path / "removal.html").read_text()
    assert len(removal.plot().axes[0].lines) == 3


def test_what_cannot_be_removed_is_said(tmp_path: Path) -> None:
    run = Looped()
    analyzer = run.analyzer(tmp_path, network())
    with pytest.raises(ConfigurationError, match="No stage 'fourth'"):
        analyzer.remove("fourth", [margins()])
    with pytest.raises(ConfigurationError, match="Nothing to improve"):
        analyzer.remove("first", [])
    with pytest.raises(ConfigurationError, match="'change' does not predict weights"):
        analyzer.remove("first", [margins()], method="change")
    removal = analyzer.remove("first", [margins()], method="subtract")
    with pytest.raises(NotComparableError, match="lacks"):
        removal.apply(torch.nn.Linear(2, 2))
