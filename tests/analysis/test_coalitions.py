"""Shapley values: what they add up to, where they are exact, what they cost."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

from tests.analysis.looped import Looped, network
from tests.analysis.stages import margins
from trainer_attrib.errors import ConfigurationError, MissingProgramError


def values_of(result, stage):
    return torch.tensor([row.effect for row in result.rows if row.stage == stage], dtype=torch.float64)


def test_exact_replays_give_the_mean_over_all_orders_of_really_trained_models(tmp_path: Path) -> None:
    run, behavior = Looped("momentum"), margins()
    analyzer = run.analyzer(tmp_path, network(norm=False))
    stages = list(run.steps)

    def trained(chosen: tuple[str, ...]) -> torch.Tensor:
        kept = {stage: count if stage in chosen else 0 for stage, count in run.steps.items()}
        return behavior.values(Looped("momentum", kept).train(network(norm=False)))

    expected = dict.fromkeys(stages, 0)
    for order in itertools.permutations(stages):
        for place, stage in enumerate(order):
            gained = trained(order[: place + 1]) - trained(order[:place])
            expected[stage] = expected[stage] + gained / 6
    found = analyzer.shapley([behavior], run.programs, merge=1, thin=1)
    for stage in stages:
        torch.testing.assert_close(values_of(found, stage), expected[stage], rtol=0, atol=1e-12)
    assert max(row.error_bar for row in found.rows) < 1e-12


@pytest.mark.parametrize("kind", ["AdamW", "SGD"])
def test_they_add_up_whatever_the_pace(kind: str, tmp_path: Path) -> None:
    run, behavior = Looped(kind), margins()
    analyzer = run.analyzer(tmp_path, network())
    found = analyzer.shapley([behavior], run.programs)
    whole = behavior.values(analyzer.model) - behavior.values(network())
    torch.testing.assert_close(sum(values_of(found, stage) for stage in run.steps), whole, rtol=0, atol=1e-12)
    [sums] = found.interactions
    assert sums.residual == pytest.approx(0, abs=1e-12)
    assert any(row.error_bar > 1e-3 for row in found.rows)
    # 7 merged steps of the second stage from two states, 5 of the third from four, on a quarter of each batch
    assert sum({row.stage: row.cost for row in found.rows}.values()) == pytest.approx((2 * 7 + 4 * 5) / 4)


def test_skip_effects_do_not_add_up_and_say_so(tmp_path: Path) -> None:
    run, behavior = Looped(), margins()
    analyzer = run.analyzer(tmp_path, network())
    found = analyzer.stage_effects([behavior], ["change", "retrain"], run.programs)
    change, retrain = found.interactions
    assert change.residual == pytest.approx(0, abs=1e-12)
    assert abs(retrain.residual) > 0.01
    assert retrain.whole == pytest.approx(float((behavior.values(analyzer.model) - behavior.values(network())).mean()))
    assert "(interaction)" in repr(found)
    assert found.to_dict()["interactions"][1]["residual"] == retrain.residual
    assert "Do the effects add up?" in found._repr_html_()


def test_more_than_four_stages_and_missing_programs_are_refused(tmp_path: Path) -> None:
    run = Looped(steps={str(number): 1 for number in range(5)})
    analyzer = run.analyzer(tmp_path / "five", network())
    with pytest.raises(ConfigurationError, match="5 stages need 30 replays"):
        analyzer.shapley([margins()], run.programs)
    run = Looped()
    analyzer = run.analyzer(tmp_path / "three", network())
    with pytest.raises(MissingProgramError, match="third"):
        analyzer.shapley([margins()], {"second": run.programs["second"]})
