"""Shadows as a rung, and the climb from rung to rung."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.analysis.looped import Looped, network, weights_of
from tests.analysis.stages import margins
from trainer_attrib.analysis.effects import auto
from trainer_attrib.analysis.effects.auto import Auto, relative_bar
from trainer_attrib.analysis.effects.estimate import Estimate, pooled
from trainer_attrib.analysis.effects.pull import pull, reach
from trainer_attrib.analysis.effects.replay import Arms
from trainer_attrib.errors import MissingProgramError, NotComparableError
from trainer_attrib.types import Shadow

STEPS = {"first": 10, "second": 10, "third": 10}


def shadowed(thin: int, replicas: int = 1) -> Looped:
    """Stages whose recorders are asked for shadows of all earlier ones."""
    names = list(STEPS)
    asked = {
        stage: [Shadow(of, thin=thin, replicas=replicas) for of in names[:number]] for number, stage in enumerate(names)
    }
    return Looped("AdamW", STEPS, shadows=asked)


def values(rows: Any, stage: str, method: str) -> torch.Tensor:
    return torch.tensor([row.effect for row in rows if (row.stage, row.method) == (stage, method)])


def bars(rows: Any, stage: str, method: str) -> torch.Tensor:
    return torch.tensor([row.error_bar for row in rows if (row.stage, row.method) == (stage, method)])


def test_a_shadow_of_whole_batches_is_retraining(tmp_path: Path) -> None:
    run, behavior = shadowed(thin=1), margins()
    analyzer = run.analyzer(tmp_path, network(dropout=0))
    found = analyzer.stage_effects([behavior], ["shadow", "retrain"], run.programs)
    for stage in ("first", "second"):
        exact = values(found.rows, stage, "retrain")
        torch.testing.assert_close(values(found.rows, stage, "shadow"), exact, rtol=1e-6, atol=1e-8)
        assert exact.abs().max() > 0.01
    costs = {row.stage: row.cost for row in found.rows if row.method == "shadow"}
    assert costs == {"first": 40, "second": 20, "third": 0}  # two passes over each batch of the later stages
    assert any("does not tell how uncertain" in caveat for caveat in found.caveats)


def test_replicas_are_averaged_and_their_disagreement_is_the_bar(tmp_path: Path) -> None:
    run, behavior = shadowed(thin=2, replicas=2), margins()
    analyzer = run.analyzer(tmp_path, network(dropout=0, norm=False))
    rows = analyzer.stage_effects([behavior], "shadow").rows
    last, final = analyzer.lineage[-1], weights_of(analyzer.model)
    both = [last.shadow("first", replica) for replica in (0, 1)]
    model = network(dropout=0, norm=False)
    model.load_state_dict({name: (both[0][name] + both[1][name]) / 2 for name in final})
    expected = behavior.values(analyzer.model) - behavior.values(model)
    torch.testing.assert_close(values(rows, "first", "shadow"), expected.float(), rtol=1e-5, atol=1e-6)
    assert all(row.error_bar > 0 for row in rows if row.stage != "third")


def test_without_a_shadow_it_says_what_to_record(tmp_path: Path) -> None:
    run = Looped("AdamW", STEPS)
    analyzer = run.analyzer(tmp_path, network())
    with pytest.raises(NotComparableError, match=r"no complete shadow of 'first'; it has none.*\n.*shadow=\[Shadow"):
        analyzer.stage_effects([margins()], "shadow")


@dataclass(frozen=True)
class Rung:
    """Says what it was told to, at a price."""

    name: str
    bar: float
    share: float
    lacks: bool = False
    caveat: str = ""
    instead: str = "something else"

    def check(self, lineage: Any, stage: Any) -> None:
        if self.lacks:
            raise MissingProgramError("no program")

    def price(self, lineage: Any, stage: Any) -> float:
        return self.share * lineage.later_steps(stage)

    def estimate(self, lineage: Any, stage: Any) -> Estimate:
        ones = [torch.ones(7).double()]
        cost = self.price(lineage, stage)
        return Estimate(ones, [self.bar * one for one in ones], self.name, cost)


@pytest.mark.parametrize(
    ("rungs", "settings", "reached", "spent"),
    [
        ([("a", 0.1, 0.0), ("b", 0.0, 0.5)], {}, "a", 0.0),
        ([("a", 0.9, 0.0), ("b", 0.1, 0.25), ("c", 0.0, 0.5)], {}, "b", 0.25),
        ([("a", 0.9, 0.0), ("b", 0.3, 0.25), ("c", 0.0, 0.75)], {}, "c", 1.0),
        ([("a", 0.9, 0.0), ("b", 0.3, 0.25), ("c", 0.0, 0.75)], {"budget": 0.5}, "b", 0.25),
        ([("a", 0.1, 0.0), ("b", 0.3, 0.25)], {"accept": 0.01}, "b", 0.25),
    ],
)
def test_auto_stops_at_the_first_acceptable_rung_that_it_can_pay_for(
    rungs: list[Any], settings: Any, reached: str, spent: float, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(auto, "LADDER", (Rung("x", 0.0, 0.0, lacks=True), *(Rung(*rung) for rung in rungs)))
    analyzer = Looped("SGD", STEPS).analyzer(tmp_path, network())
    rows = analyzer.stage_effects([margins()], Auto(**settings)).rows
    first = [row for row in rows if row.stage == "first"]
    assert {row.method for row in first} == {reached}
    assert {row.cost for row in first} == {spent * 20}


def test_auto_takes_the_mean_of_a_shadow_and_a_replay_by_what_their_bars_say(tmp_path: Path) -> None:
    run, behavior = shadowed(thin=4), margins()
    analyzer = run.analyzer(tmp_path, network(dropout=0, norm=False))
    rows = analyzer.stage_effects([behavior], ["shadow", "replay", Auto(accept=0.0, budget=0.3)], run.programs).rows
    shadow, replay = (bars(rows, "first", name).square().sum() for name in ("shadow", "replay"))
    weight = replay / (shadow + replay)
    assert 0.05 < weight < 0.95
    mean = weight * values(rows, "first", "shadow") + (1 - weight) * values(rows, "first", "replay")
    torch.testing.assert_close(values(rows, "first", "shadow and replay"), mean)
    both = bars(rows, "first", "shadow and replay")
    apart = values(rows, "first", "shadow") - values(rows, "first", "replay")
    assert (both > bars(rows, "first", "shadow")).all()
    assert (both > apart.abs() / 2**0.5).all()


def test_pull_is_what_training_did_to_a_displacement() -> None:
    kept = {"a": torch.tensor([3.0, 0.0]), "b": torch.tensor([4.0])}
    assert pull(kept, kept) == 0
    assert pull({}, kept) == 1  # all of it was taken back
    assert pull({"a": 2 * kept["a"], "b": kept["b"], "c": torch.tensor([4.0])}, kept) == 1  # sqrt(3^2 + 4^2) / 5
    assert pull({"a": torch.tensor([torch.nan, 0.0])}, kept) == float("inf")
    assert pull(kept, {}) == float("inf")
    assert pull({}, {}) == 0
    assert reach({"b": torch.tensor([1.0])}, {"a": torch.tensor([9.0]), "b": torch.tensor([2.0])}) == 0.5


def test_a_replay_that_diverged_says_nothing_beside_a_shadow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, behavior = shadowed(thin=4), margins()
    analyzer = run.analyzer(tmp_path, network(dropout=0, norm=False))
    monkeypatch.setattr(Arms, "error_bars", lambda arms, final: [torch.full_like(f, torch.inf) for f in final])
    asked = ["shadow", Auto(accept=0.0, budget=0.3)]
    rows = [r for r in analyzer.stage_effects([behavior], asked, run.programs).rows if r.stage == "first"]
    assert {row.method for row in rows} == {"shadow"}
    assert len({(row.query, row.effect, row.error_bar) for row in rows}) == len(rows) / 2


def test_bars_are_pooled_over_queries_and_ways_and_infinite_where_one_failed() -> None:
    one, other = torch.tensor([3.0, 0.0]).double(), torch.tensor([0.0, 4.0]).double()
    [bar] = pooled([one], [other], scale=2.0)
    squares = torch.tensor([4.5, 8.0]).double()
    torch.testing.assert_close(bar, 2 * ((squares + squares.mean()) / 2).sqrt())
    [bar] = pooled([torch.tensor([torch.nan, 1.0])], scale=1.0)
    assert bar.isinf().all()
    assert relative_bar(Estimate([one], [bar], "")) == float("inf")
