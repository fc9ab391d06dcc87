from __future__ import annotations

import copy
import random

import numpy as np
import pytest
import torch
from torch import nn

from tests.analysis.stages import STAGES, Classifier, margins, three_stages, train
from trainer_attrib import Analyzer
from trainer_attrib.analysis.displacement import moved
from trainer_attrib.analysis.retraining import retrain
from trainer_attrib.analysis.training_state import TrainingState, copy_model, standing
from trainer_attrib.errors import ConfigurationError, MissingProgramError

KINDS = ("adamw", "sgd", "momentum")


def effects_of(run, behavior, method):
    result = Analyzer(run.ledger, run.model).stage_effects([behavior], method, run.programs)
    return {
        stage: torch.tensor([r.effect for r in result.rows if r.stage == stage], dtype=torch.float64)
        for stage in STAGES
    }


@pytest.mark.parametrize("kind", KINDS)
def test_changes_sum_to_the_whole_training(tmp_path, kind):
    run, behavior = three_stages(tmp_path / "run", kind), margins()
    total = sum(effects_of(run, behavior, "change").values())
    untrained = Classifier().double()
    untrained.load_state_dict(run.initial)
    torch.testing.assert_close(total, behavior.values(run.model) - behavior.values(untrained), rtol=0, atol=1e-12)


@pytest.mark.parametrize("method", ["subtract", "retrain", "auto"])
def test_the_last_stage_s_effect_is_its_change(tmp_path, method):
    run, behavior = three_stages(tmp_path / "run"), margins()
    last = effects_of(run, behavior, "change")["third"]
    torch.testing.assert_close(effects_of(run, behavior, method)["third"], last, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_running_every_stage_again_reproduces_the_recorded_bits(tmp_path, kind):
    run = three_stages(tmp_path / "run", kind)
    closure = Analyzer(run.ledger, run.model).closure(run.programs)
    assert closure.exact
    assert set(closure.differences) == set(STAGES)


def test_programs_that_train_otherwise_are_found_out(tmp_path):
    run = three_stages(tmp_path / "run")
    run.programs["second"] = lambda model: lambda: train(model, "second", "adamw", 0.021)
    closure = Analyzer(run.ledger, run.model).closure(run.programs)
    assert not closure.exact
    assert closure.differences["first"] == 0
    assert closure.differences["second"] > 0
    assert "does NOT reproduce" in str(closure)


def test_retrain_is_training_without_the_stage(tmp_path):
    run, behavior = three_stages(tmp_path / "run"), margins()
    without = Classifier().double()
    without.load_state_dict(run.initial)
    train(without, "second")
    train(without, "third")
    expected = behavior.values(run.model) - behavior.values(without)
    torch.testing.assert_close(effects_of(run, behavior, "retrain")["first"], expected, rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_subtract_is_exact_where_later_stages_do_not_react(tmp_path, kind):
    """With a loss linear in the weights no gradient depends on them: only weight decay acts on an earlier change."""

    class Linear(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(6, 3)

        def forward(self, x):
            return self.layer(x)

    import tests.analysis.stages as stages

    original, stages.Classifier = stages.Classifier, Linear
    try:
        run = three_stages(tmp_path / "run", kind, loss=lambda out, y: out.gather(1, y[:, None]).mean())
    finally:
        stages.Classifier = original
    behavior = margins()
    exact, cheap = effects_of(run, behavior, "retrain"), effects_of(run, behavior, "subtract")
    change = effects_of(run, behavior, "change")
    for stage in STAGES:
        torch.testing.assert_close(cheap[stage], exact[stage], rtol=1e-9, atol=1e-10)
    assert (change["first"] - exact["first"]).abs().max() > 1e-4  # the decay that subtract accounts for is not nothing


def test_subtract_never_calls_an_untested_effect_reliable(tmp_path):
    run = three_stages(tmp_path / "run")
    result = Analyzer(run.ledger, run.model).stage_effects([margins()], "subtract")
    assert {row.stage for row in result.rows if row.reliable} == {"third"}
    said = [caveat for caveat in result.caveats if caveat.startswith("not reliable")]
    assert [line.split("'")[1] for line in said] == ["first", "second"]
    assert all("run method='replay'" in line for line in said)


def test_auto_climbs_to_retraining_only_with_programs(tmp_path):
    run = three_stages(tmp_path / "run")
    analyzer = Analyzer(run.ledger, run.model)
    with_programs = {r.stage: r.method for r in analyzer.stage_effects([margins()], "auto", run.programs).rows}
    without = {r.stage: r.method for r in analyzer.stage_effects([margins()], "auto").rows}
    assert with_programs == {"first": "retrain", "second": "retrain", "third": "auto"}
    assert without == {"first": "subtract", "second": "subtract", "third": "auto"}


def test_the_model_and_the_random_states_are_left_alone(tmp_path):
    run = three_stages(tmp_path / "run")
    run.model.train()
    run.model.head.weight.requires_grad_(False)
    before = copy.deepcopy(run.model.state_dict())
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    analyzer = Analyzer(run.ledger, run.model)
    analyzer.stage_effects([margins()], ["change", "subtract", "retrain"], run.programs)
    analyzer.influence([margins()])
    assert all(torch.equal(before[name], value) for name, value in run.model.state_dict().items())
    assert run.model.training
    assert not run.model.head.weight.requires_grad
    assert run.model.body.weight.requires_grad
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in run.model.modules())
    assert torch.equal(states[0], torch.get_rng_state())
    assert np.array_equal(states[1], np.random.get_state()[1])
    assert states[2] == random.getstate()


def test_weights_come_back_after_an_error_inside():
    model = nn.Linear(3, 2)
    before = model.weight.detach().clone()

    def break_off():
        with moved(model, {"weight": torch.ones(2, 3).double()}):
            assert not torch.equal(model.weight, before)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        break_off()
    assert torch.equal(model.weight, before)


def test_a_copy_computes_with_its_own_weights():
    """TRL gives a model a forward of its own whose closure holds the original; a plain copy would go on using it."""
    import functools

    model = Classifier()
    original = model.forward

    @functools.wraps(type(model).forward)
    def patched(self, x):
        return original(x)

    model.forward = patched.__get__(model)
    copied = copy_model(model)
    with standing(copied, TrainingState({n: torch.zeros_like(p) for n, p in copied.named_parameters()})):
        assert not copied(torch.randn(2, 6)).any()


def test_missing_programs_are_named(tmp_path):
    run = three_stages(tmp_path / "run")
    with pytest.raises(MissingProgramError, match=r"\['third'\].*\n.*\n.*programs="):
        Analyzer(run.ledger, run.model).stage_effects([margins()], "retrain", {"second": run.programs["second"]})


def test_a_program_must_return_something_that_trains(tmp_path):
    run = three_stages(tmp_path / "run")
    stage = Analyzer(run.ledger, run.model).lineage[0]
    with pytest.raises(MissingProgramError, match="returned Classifier"):
        retrain(run.model, TrainingState({}), [stage], {"first": lambda model: model})


def test_an_unknown_method_is_refused_with_the_known_ones(tmp_path):
    run = three_stages(tmp_path / "run", stages=STAGES[:1])
    with pytest.raises(
        ConfigurationError, match="'auto', 'change', 'subtract', 'first_order', 'propagate', 'shadow', 'replay'"
    ):
        Analyzer(run.ledger, run.model).stage_effects([margins()], "shrink")


def test_results_render_as_table_text_and_page(tmp_path):
    run = three_stages(tmp_path / "run")
    analyzer = Analyzer(run.ledger, run.model)
    effects = analyzer.stage_effects([margins()], ["change", "retrain"], run.programs)
    influence = analyzer.influence([margins(count=2)])
    assert effects.to_table().column_names == [
        "behavior", "query", "stage", "method", "read_out", "effect", "error_bar", "reliable", "cost",
    ]  # fmt: skip
    assert effects.to_table().num_rows == 2 * 3 * 7
    assert {r.cost for r in effects.rows if r.method == "retrain"} == {32, 16, 0}
    assert "second" in repr(effects)
    html = analyzer.report(tmp_path / "report.html", effects, influence).read_text()
    for expected in ("Recorded stages", "Effect of each stage: margin", "proponents", "row 3"):
        assert expected in html
    assert "<table" in effects._repr_html_()
    assert effects.report(tmp_path / "effects.html").exists()


def test_results_plot(tmp_path):
    pytest.importorskip("matplotlib").use("Agg")
    import matplotlib.pyplot as pyplot

    run = three_stages(tmp_path / "run")
    analyzer = Analyzer(run.ledger, run.model)
    effects = analyzer.stage_effects([margins("a"), margins("b", seed=4)], ["change", "subtract"])
    influence = analyzer.influence([margins(count=2)])
    figures = [effects.plot(), influence.plot()]
    assert [len(figure.axes) for figure in figures] == [2, 1]
    assert [axis.get_title() for axis in figures[0].axes] == ["a", "b"]
    assert len(figures[0].axes[0].patches) == 6
    for figure in figures:
        figure.savefig(tmp_path / "plot.png")
        pyplot.close(figure)
