"""Exact replays are the recorded training; coarse ones cost what they say and come close to it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.analysis.looped import OPTIMIZERS, Looped, network
from tests.analysis.stages import margins
from trainer_attrib import Analyzer
from trainer_attrib.analysis.effects.replay import Replay, run_arms
from trainer_attrib.analysis.replaying import EXACT, Pace, replay
from trainer_attrib.analysis.retraining import retrain
from trainer_attrib.analysis.training_state import TrainingState, state_of
from trainer_attrib.errors import MissingProgramError, NotComparableError


def replayed(analyzer: Analyzer, run: Looped, stage: str, when: str = "start", pace: Pace = EXACT) -> Any:
    """Later stages run again step by step from the start (or end) of a stage."""
    lineage = analyzer._view([], run.programs)
    reader = analyzer.ledger.stage(stage)
    start = lineage.start(reader) if when == "start" else lineage.end(reader)
    return replay(analyzer.model, start, lineage.later(reader), run.programs, pace)


def assert_same(found: TrainingState, expected: TrainingState) -> None:
    for values, others in ((found.weights, expected.weights), (found.buffers, expected.buffers)):
        assert values.keys() == others.keys()
        assert [name for name, value in values.items() if not torch.equal(value, others[name])] == []


def schedule(optimizer: Any) -> Any:
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + 0.1 * step))


EVERYTHING = {"make_schedule": schedule, "max_norm": 0.5, "accumulate": 2}

# ---- exact ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_exact_replays_are_the_recorded_training_bit_for_bit(kind: str, tmp_path: Path) -> None:
    run = Looped(kind, settings=EVERYTHING)
    analyzer = run.analyzer(tmp_path, network())
    found = replayed(analyzer, run, "first", "end")
    assert_same(found.state, state_of(analyzer.model))
    assert found.cost == 22


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_exact_replays_are_retraining_bit_for_bit(kind: str, tmp_path: Path) -> None:
    run = Looped(kind, settings=EVERYTHING)
    analyzer = run.analyzer(tmp_path, network())
    lineage = analyzer._view([], run.programs)
    stage = analyzer.lineage[0]
    by_trainer = retrain(analyzer.model, lineage.start(stage), lineage.later(stage), run.programs)
    assert_same(replayed(analyzer, run, "first").state, by_trainer)
    moved = [not torch.equal(by_trainer.weights[n], p) for n, p in analyzer.model.named_parameters()]
    assert any(moved), "leaving out the first stage changed nothing"


@pytest.mark.parametrize("kind", ["AdamW", "momentum", "AMSGrad", "RMSprop", "Adafactor"])
def test_a_carried_state_is_carried_past_the_stage_that_is_left_out(kind: str, tmp_path: Path) -> None:
    run = Looped(kind, carried=("second", "third"), settings=EVERYTHING)
    analyzer = run.analyzer(tmp_path, network(dropout=0))
    assert_same(replayed(analyzer, run, "first", "end").state, state_of(analyzer.model))
    assert analyzer.closure(run.programs).exact
    without = run.without("second").train(network(dropout=0))
    assert_same(replayed(analyzer, run, "second").state, state_of(without))


def test_what_a_stage_froze_stays(tmp_path: Path) -> None:
    run = Looped(frozen={"second": "0.", "third": "4."})
    analyzer = run.analyzer(tmp_path, network())
    assert_same(replayed(analyzer, run, "first", "end").state, state_of(analyzer.model))


def test_exact_replay_gives_the_effect_of_retraining_in_every_read_out(tmp_path: Path) -> None:
    run, behavior = Looped(settings=EVERYTHING), margins()
    analyzer = run.analyzer(tmp_path, network(norm=False))
    for read_out in ("diff", "plain", "cv"):
        methods = ["retrain", Replay(merge=1, thin=1, read_out=read_out)]
        rows = analyzer.stage_effects([behavior], methods, run.programs).rows
        exact = torch.tensor([r.effect for r in rows if r.method == "retrain"])
        found = torch.tensor([r.effect for r in rows if r.method == "replay"])
        torch.testing.assert_close(found, exact, rtol=0, atol=1e-12)
        assert exact[:7].abs().min() > 1e-4
        assert max(r.error_bar for r in rows) < 1e-12


def test_running_norms_are_measured_as_they_would_be(tmp_path: Path) -> None:
    run, behavior = Looped(), margins()
    analyzer = run.analyzer(tmp_path, network(dropout=0))
    rows = analyzer.stage_effects([behavior], "retrain", run.programs).rows
    found = torch.tensor([r.effect for r in rows if r.stage == "second"], dtype=torch.float64)
    without = run.without("second").train(network(dropout=0))
    torch.testing.assert_close(found, behavior.values(analyzer.model) - behavior.values(without), rtol=0, atol=1e-12)


# ---- coarse ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["AdamW", "momentum"])
@pytest.mark.parametrize("carried", [(), ("second", "third")], ids=["reset", "carried"])
def test_coarse_replays_come_close_at_the_cost_they_say(kind: str, carried: Any, tmp_path: Path) -> None:
    run = Looped(kind, {"first": 40, "second": 40, "third": 40}, {"second": 0.2, "third": 0.2}, carried)
    behavior = margins(count=24)
    analyzer = run.analyzer(tmp_path, network(dropout=0, norm=False))
    methods = ["change", "retrain", Replay(merge=2, thin=4)]
    rows = analyzer.stage_effects([behavior], methods, run.programs).rows
    for stage, share in (("first", 1 / 4), ("second", 1 / 4)):
        values = {
            m: torch.tensor([r.effect for r in rows if (r.stage, r.method) == (stage, m)])
            for m in ("change", "retrain", "replay")
        }
        error = (values["replay"] - values["retrain"]).norm() / values["retrain"].norm()
        assert error < 0.2
        assert error < 0.5 * (values["change"] - values["retrain"]).norm() / values["retrain"].norm()
        [cost] = {r.cost for r in rows if (r.stage, r.method) == (stage, "replay")}
        later = 80 if stage == "first" else 40
        assert cost == pytest.approx(share * later)


def test_replays_leave_the_model_and_the_random_states_alone(tmp_path: Path) -> None:
    run = Looped()
    analyzer = run.analyzer(tmp_path, network())
    analyzer.model.eval()
    before, state = state_of(analyzer.model), torch.get_rng_state()
    analyzer.stage_effects([margins()], "replay", run.programs)
    assert_same(state_of(analyzer.model), before)
    assert torch.equal(torch.get_rng_state(), state)
    assert not analyzer.model.training


def test_closure_is_zero_where_the_replay_with_the_stage_is_exact(tmp_path: Path) -> None:
    run, behavior = Looped(), margins()
    analyzer = run.analyzer(tmp_path, network())
    lineage = analyzer._view([behavior], run.programs)
    assert run_arms(lineage, analyzer.lineage[0], EXACT).closure(lineage.final) == 0
    assert run_arms(lineage, analyzer.lineage[0], Pace(4, 4)).closure(lineage.final) > 0.01


# ---- refusals -------------------------------------------------------------------------------------------------------


def test_a_function_cannot_be_run_step_by_step(tmp_path: Path) -> None:
    run = Looped()
    analyzer = run.analyzer(tmp_path, network())
    programs = {stage: lambda model: lambda: None for stage in run.steps}
    with pytest.raises(MissingProgramError, match=r"'second' returned function.*\n.*\n.*Loop"):
        analyzer.stage_effects([margins()], "replay", programs)


def test_an_iterable_of_losses_is_enough(tmp_path: Path) -> None:
    run, behavior = Looped(), margins()
    analyzer = run.analyzer(tmp_path, network())

    def losses_of(stage: str) -> Any:
        def program(model: nn.Module) -> Any:
            steps = run.loop(stage, model).steps()
            return (loss for step in steps for loss in step.losses)

        return program

    programs = {stage: losses_of(stage) for stage in run.steps}
    exact, found = (analyzer.stage_effects([behavior], "retrain", p).rows for p in (run.programs, programs))
    assert [row.effect for row in found] == [row.effect for row in exact]


def test_too_few_batches_are_said(tmp_path: Path) -> None:
    run = Looped()
    analyzer = run.analyzer(tmp_path, network())
    programs = {**run.programs, "second": lambda model: [lambda: model(torch.ones(2, 6).double()).sum()] * 3}
    with pytest.raises(NotComparableError, match="ran out of batches after 3 of 13 recorded steps"):
        analyzer.stage_effects([margins()], Replay(merge=1, thin=1), programs)


def test_another_optimizer_than_the_recorded_one_is_said(tmp_path: Path) -> None:
    run = Looped("Adafactor")
    analyzer = run.analyzer(tmp_path, network())
    programs = Looped("AdamW").programs
    with pytest.raises(NotComparableError, match=r"trained by .*Adafactor.*makes AdamW"):
        analyzer.stage_effects([margins()], "replay", programs)
