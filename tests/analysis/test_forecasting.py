"""Forecasts of plain runs: exact where training is linear, unchanged runs, bars, contributions, plans."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from trainer_attrib import Behavior
from trainer_attrib.analysis.forecasting.forecast import forecast
from trainer_attrib.analysis.forecasting.gradient_pass import gradient_pass
from trainer_attrib.analysis.forecasting.plan import Plan
from trainer_attrib.analysis.forecasting.prediction import View
from trainer_attrib.analysis.forecasting.reading import mean_gradient
from trainer_attrib.analysis.forecasting.run import TrainingRow
from trainer_attrib.analysis.loops import Loop
from trainer_attrib.analysis.training_state import random_states_kept
from trainer_attrib.errors import BehaviorError, ConfigurationError
from trainer_attrib.tap.names import parameters_by_name

pytestmark = pytest.mark.usefixtures("float64")
STEPS, BATCH = 12, 3
RATES = [[0.03 * (STEPS - step) / STEPS] for step in range(STEPS)]


class PlainRun:
    """A loop that has not begun, over examples in their own order."""

    def __init__(
        self, model: nn.Module, loss: Callable[..., Tensor], x_NI: Tensor, make: Callable, size: int = BATCH,
        **settings: Any,
    ) -> None:  # fmt: skip
        self.size = size
        self._loss, self.x_NI, self._weights_N = loss, x_NI, torch.ones(len(x_NI))
        numbers = torch.arange(len(x_NI)).split(size)
        self.steps = Loop(model, self._weighted, numbers, make, len(RATES), **settings)
        self.rates: Sequence[Sequence[float]] = RATES

    def _weighted(self, model: nn.Module, numbers: Tensor) -> Tensor:
        return (self._weights_N[numbers] * self._loss(model, self.x_NI[numbers])).mean()

    @property
    def batch_size(self) -> int:
        return self.size

    @contextmanager
    def undisturbed(self) -> Iterator[None]:
        with random_states_kept():
            yield

    def rows(self) -> list[TrainingRow]:
        return [TrainingRow(str(i), "even" if i % 2 == 0 else "odd", "", f"row {i}") for i in range(len(self.x_NI))]

    def example_loss(self, number: int) -> Tensor:
        return self._loss(self.steps.model, self.x_NI[number : number + 1]).mean()

    @contextmanager
    def arranged(self, plan: Plan) -> Iterator[None]:
        self._weights_N = torch.from_numpy(plan.effective)
        try:
            yield
        finally:
            self._weights_N = torch.ones(len(self.x_NI))


def examples(seed: int = 0, count: int = 36) -> Tensor:
    return torch.randn(count, 4, generator=torch.Generator().manual_seed(seed)) + torch.tensor([1.0, 0.5, -0.5, 0.0])


def linear(model: nn.Module, x_NI: Tensor) -> Tensor:
    """A loss whose gradient does not depend on the weights."""
    return model(x_NI)[:, 0] - 0.5 * model(x_NI)[:, 1]


def curved(model: nn.Module, x_NI: Tensor) -> Tensor:
    return nn.functional.softplus(-model(x_NI)[:, 0])


def first_output(name: str = "first output") -> Behavior:
    return Behavior(name, list(examples(7, 9)), lambda model, items: model(torch.stack(items))[:, 0])


def second_output() -> Behavior:
    return Behavior("second output", list(examples(8, 9)), lambda model, items: model(torch.stack(items))[:, 1])


def adamw(model: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1.0, betas=(0.8, 0.9), weight_decay=0.1)


def sgd(model: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.7, weight_decay=0.0)


def rmsprop(model: Any) -> torch.optim.Optimizer:
    return torch.optim.RMSprop(model.parameters(), lr=1.0)


def run_of(make: Callable = adamw, loss: Callable[..., Tensor] = linear, **settings: Any) -> PlainRun:
    torch.manual_seed(2)
    return PlainRun(nn.Linear(4, 2), loss, examples(), make, **settings)


def trained(run: PlainRun) -> nn.Module:
    """A copy, really trained."""
    model = copy.deepcopy(run.steps.model)
    again = PlainRun(model, run._loss, run.x_NI, run.steps.make_optimizer, max_norm=run.steps.max_norm)
    again._weights_N = run._weights_N
    optimizer = again.steps.optimizer()
    for rates, step in zip(RATES, again.steps.steps(), strict=False):
        optimizer.zero_grad()
        for loss in step.losses:
            loss().backward()
        again.steps.clip()
        optimizer.param_groups[0]["lr"] = rates[0]
        optimizer.step()
    return model


@pytest.mark.parametrize("make", [adamw, sgd, rmsprop])
@pytest.mark.parametrize("norm", [None, 0.8])
def test_where_gradients_do_not_change_the_forecast_is_exact(make: Callable, norm: float | None) -> None:
    run = run_of(make, max_norm=norm)
    before = {name: p.detach().clone() for name, p in parameters_by_name(run.steps.model).items()}
    behaviors = [first_output(), second_output()]
    found = forecast(run, behaviors)
    model = trained(run)
    for behavior in behaviors:
        actual = float((behavior.values(model) - behavior.values(run.steps.model)).mean())
        assert found.of(behavior.name).predicted == pytest.approx(actual, rel=1e-9)
    assert all(torch.equal(p, before[name]) for name, p in parameters_by_name(run.steps.model).items())


def test_look_ahead_over_all_steps_is_training() -> None:
    from trainer_attrib.analysis.forecasting.predictors import LookAhead

    run, behavior = run_of(loss=curved), first_output()
    found = forecast(run, [behavior], LookAhead(part=1.0))
    actual = float((behavior.values(trained(run)) - behavior.values(run.steps.model)).mean())
    assert found.rows[0].predicted == pytest.approx(actual, rel=1e-9)
    quarter = forecast(run, [behavior], "look_ahead").rows[0]
    assert quarter.cost == 0.25
    assert quarter.predicted == pytest.approx(actual, rel=0.5)


class Headed(nn.Linear):
    """Its outputs are linear in its weights; losses are computed from them outside."""

    def forward(self, input: Tensor) -> Any:
        return SimpleNamespace(logits=super().forward(input))


def test_where_outputs_are_linear_linearised_training_is_training() -> None:
    torch.manual_seed(2)

    def saturating(model: nn.Module, x_NI: Tensor) -> Tensor:
        return nn.functional.softplus(-20 * model(x_NI).logits[:, 0])

    run = PlainRun(Headed(4, 2), saturating, examples(), adamw)
    behavior = Behavior("first output", list(examples(7, 9)), lambda m, items: m(torch.stack(items)).logits[:, 0])
    rows = {row.method: row for row in forecast(run, [behavior], ["linearised", "frozen"]).rows}
    actual = float((behavior.values(trained(run)) - behavior.values(run.steps.model)).mean())
    assert rows["linearised"].predicted == pytest.approx(actual, rel=1e-6)
    assert abs(rows["frozen"].predicted - actual) > 0.05 * abs(actual)


def test_warm_and_straight_lines_follow_their_formulas() -> None:
    run, behavior = run_of(loss=curved), first_output()
    gradients = gradient_pass(run)
    places = parameters_by_name(run.steps.model)
    batches = [
        torch.autograd.grad(curved(run.steps.model, x).mean(), list(places.values())) for x in examples().split(BATCH)
    ]
    total = sum(rate[0] for rate in RATES)
    for number, name in enumerate(places):
        stacked = torch.stack([batch[number] for batch in batches])
        expected = -total * stacked.mean(0) / (stacked.square().mean(0).sqrt() + 1e-8)
        torch.testing.assert_close(gradients.warm[name], expected)
    slope = mean_gradient(run.steps.model, behavior)
    dot = sum(float((slope[name] * gradients.warm[name]).sum()) for name in slope)
    rows = forecast(run, [behavior], ["gradient", "warm"]).rows
    assert rows[0].predicted == pytest.approx(dot)
    assert rows[1].predicted == pytest.approx(dot), "the behavior is linear in the weights"


def test_contributions_add_up_to_the_straight_line() -> None:
    for make in (adamw, sgd):
        run, behaviors = run_of(make, curved), [first_output(), second_output()]
        found = forecast(run, behaviors, "gradient")
        told = found.contributions()
        assert told.values.shape == (2, 36)
        for behavior in behaviors:
            assert told.of(behavior.name).sum() == pytest.approx(found.of(behavior.name).predicted, rel=1e-6, abs=1e-9)
        assert sum(told.by_source("first output").values()) == pytest.approx(told.of("first output").sum())
        top = told.top("first output", 3)
        assert top[0].contribution == told.of("first output").max()
        assert top[0].text == f"row {top[0].example}"
        assert told.top("first output", 1, against=True)[0].contribution == told.of("first output").min()
        assert told.to_table().num_rows == 72


def test_contributions_along_the_path_add_up_to_the_measured_change() -> None:
    """A behavior of degree 4 along the way: two points are exact, the first slope is not."""
    bent = Behavior("bent", list(examples(7, 9)), lambda model, items: model(torch.stack(items))[:, 0] ** 4)
    for make in (adamw, sgd):
        run = run_of(make, curved)
        before = {name: p.detach().clone() for name, p in parameters_by_name(run.steps.model).items()}
        found = forecast(run, [second_output(), bent], "warm")
        told, first = found.contributions(along="path"), found.contributions()
        for behavior in ("second output", "bent"):
            assert told.of(behavior).sum() == pytest.approx(found.of(behavior).predicted, rel=1e-6, abs=1e-9)
        assert abs(first.of("bent").sum() - found.of("bent").predicted) > 0.1 * abs(found.of("bent").predicted)
        np.testing.assert_allclose(told.of("second output"), first.of("second output"), rtol=1e-9)
        assert "measured prediction" in told.caveats[0]
        assert found.contributions(along="path") is told, "one pass over the examples is enough"
        assert all(torch.equal(p, before[name]) for name, p in parameters_by_name(run.steps.model).items())
    with pytest.raises(ConfigurationError, match="along"):
        found.contributions(along="way")  # type: ignore[arg-type]


def test_contributions_of_examples_that_a_part_of_the_batches_does_not_know() -> None:
    """A weight that only one example moves, and none of the batches that were looked at: what it adds is what it adds
    with all batches, not the learning rate over epsilon."""
    x_NI = examples()
    x_NI[:, 3] = 0.0
    x_NI[4, 3] = 2.0
    told = {}
    for share in (1.0, 0.5, 0.25):
        torch.manual_seed(2)
        run = PlainRun(nn.Linear(4, 2), linear, x_NI, adamw)
        told[share] = forecast(run, [first_output()], "gradient", share=share).contributions().of("first output")
    for share in (0.5, 0.25):
        assert told[share][4] == pytest.approx(told[1.0][4], rel=0.35)
        assert np.corrcoef(told[share], told[1.0])[0, 1] > 0.95


def test_contributions_where_training_clips() -> None:
    """One example at a time the factors are exact; in batches an example with a huge gradient shrinks its own step."""
    x_NI = examples()[: len(RATES)].clone()
    x_NI[5] *= 40
    torch.manual_seed(2)
    for size, rel in ((1, 1e-6), (3, 0.25)):
        rows = x_NI if size == 1 else torch.cat([x_NI, examples(4, 24)])
        run = PlainRun(nn.Linear(4, 2), curved, rows, sgd, size=size, max_norm=0.3)
        found = forecast(run, [first_output()], "gradient")
        told = found.contributions()
        assert told.of("first output").sum() == pytest.approx(found.rows[0].predicted, rel=rel)
        assert abs(told.of("first output")[5]) < 5 * np.abs(told.of("first output")).mean()


def test_a_share_of_the_batches_costs_as_much_and_widens_the_bar() -> None:
    run, behavior = run_of(loss=curved), first_output()
    whole, quarter = (forecast(run, [behavior], share=share).rows[0] for share in (1.0, 0.25))
    assert (whole.cost, quarter.cost) == (1.0, 0.25)
    assert quarter.error_bar > 0
    assert abs(quarter.predicted - whole.predicted) < 3 * quarter.error_bar
    with pytest.raises(ConfigurationError, match="share"):
        forecast(run, [behavior], share=0.0)


def test_data_without_preferences_stay_below_the_noise_floor() -> None:
    torch.manual_seed(2)
    x_NI = torch.randn(36, 4, generator=torch.Generator().manual_seed(3))
    run = PlainRun(nn.Linear(4, 2), linear, torch.cat([x_NI[:18], -x_NI[:18]]), adamw)
    mute = Behavior("mean of the outputs", list(examples(7, 9)), lambda m, items: m(torch.stack(items)).mean(1))
    strong = forecast(run_of(), [first_output()]).rows[0]
    weak = forecast(run, [mute]).rows[0]
    assert strong.above_noise
    assert strong.regime == "lazy"
    assert abs(weak.predicted) < abs(strong.predicted)
    assert weak.noise_floor > 0


def test_a_run_that_goes_far_says_so() -> None:
    def settled(model: nn.Module, x_NI: Tensor) -> Tensor:
        return nn.functional.softplus(-60 * model(x_NI.abs())[:, 0])

    found = forecast(run_of(loss=settled), [first_output()])
    assert found.rows[0].regime == "strong"
    assert any("strong regime" in caveat for caveat in found.caveats)


@pytest.mark.parametrize("how", ["reweight", "drop", "flip", "offset"])
def test_reshaping_takes_the_shift_away(how: str) -> None:
    run, behaviors = run_of(loss=curved), [first_output(), second_output()]
    found = forecast(run, behaviors)
    before = found.of("first output").predicted
    assert before > 0
    done = found.reshape(keep_below={"first output": 0.3 * before}, protect=[], how=how)
    after = done.after.of("first output").predicted
    assert after < 0.65 * before
    assert done.to_table().num_rows == 36
    assert done.to_dict()["how"] == how
    assert "first output" in repr(done)
    untouched = forecast(run, behaviors).of("first output").predicted
    assert untouched == before, "the run is as it was"


def test_what_is_protected_stays() -> None:
    def both(model: nn.Module, x_NI: Tensor) -> Tensor:
        kind = (x_NI[:, 3] > 0).double()
        out = model(x_NI)
        return -kind * out[:, 0] - (1 - kind) * out[:, 1]

    run, behaviors = run_of(loss=both), [first_output(), second_output()]
    found = forecast(run, behaviors, "warm")
    first, second = (found.of(b.name).predicted for b in behaviors)
    done = found.reshape(keep_below={"first output": 0.5 * first})
    told = found.contributions()
    weights = done.plan.weights
    assert told.of("second output") @ weights == pytest.approx(told.of("second output").sum(), rel=1e-5)
    assert told.of("first output") @ weights < 0.55 * told.of("first output").sum()
    assert done.after.of("first output").predicted < 0.6 * first
    assert done.after.of("second output").predicted == pytest.approx(second, rel=0.3)
    assert (weights >= 0).all()
    assert (weights <= 2).all()


def test_a_protected_behavior_that_a_plan_takes_along_is_told() -> None:
    """Dropping examples cannot leave anything else as it is; weights can only to first order."""

    def joined(model: nn.Module, x_NI: Tensor) -> Tensor:
        return curved(model, x_NI) + nn.functional.softplus(-model(x_NI)[:, 1])

    found = forecast(run_of(loss=joined), [first_output(), second_output()])
    done = found.reshape(keep_below={"first output": 0.2 * found.of("first output").predicted}, how="drop")
    before, after = (told.of("second output") for told in (found, done.after))
    assert abs(after.predicted - before.predicted) > after.error_bar
    assert any("'second output' is protected, but forecast at" in caveat for caveat in done.caveats)
    kept = found.reshape(keep_below={"first output": 0.2 * found.of("first output").predicted}, protect=[], how="drop")
    assert not any("protected" in caveat for caveat in kept.caveats)


def test_no_more_is_taken_away_than_allowed() -> None:
    run = run_of(loss=curved)
    found = forecast(run, [first_output()])
    for how in ("reweight", "drop", "offset"):
        done = found.reshape(keep_below={"first output": 0.0}, drop_at_most=0.1, how=how)
        assert 0 < done.plan.taken_away <= 0.1 + 1e-9
        assert done.caveats, "and it says that this was not enough"


def test_plans_as_columns() -> None:
    plan = Plan.keeping(["a", "b"], weights=np.array([0.5, 0.0]), masked={1: ((0, 2), ())})
    columns = plan.columns([{"id": "b"}, {"id": "a"}])
    assert columns["plan_weight"] == [0.0, 0.5]
    assert columns["plan_mask"] == [[[0, 2], []], [[], []]]
    assert plan.dropped.tolist() == [False, True]
    assert plan.taken_away == 0.75
    with pytest.raises(Exception, match="not in the plan"):
        plan.columns([{"id": "c"}])


def test_what_is_refused() -> None:
    run, behavior = run_of(), first_output()
    with pytest.raises(ConfigurationError, match="Unknown method 'magic'"):
        forecast(run, [behavior], "magic")
    with pytest.raises(ConfigurationError, match="under a name of its own"):
        forecast(run, [behavior, behavior])
    with pytest.raises(ConfigurationError, match="pairs"):
        forecast(run, [behavior], "counts")
    with pytest.raises(ConfigurationError, match="not computed from outputs"):
        forecast(run, [behavior], "linearised")
    found = forecast(run, [behavior])
    with pytest.raises(ConfigurationError, match="no behaviors"):
        found.reshape(keep_below={"other": 0.0})
    with pytest.raises(ConfigurationError, match="at least one behavior"):
        found.reshape()
    with pytest.raises(ConfigurationError, match="Unknown way"):
        found.reshape(keep_below={"first output": -9.0}, how="pray")
    rounded = Behavior("rounded", list(examples(7, 9)), lambda m, items: m(torch.stack(items))[:, 0].round().detach())
    assert forecast(run, [rounded]).rows
    with pytest.raises(BehaviorError, match="no gradient"):
        forecast(run, [rounded]).contributions()
    broken = run_of(loss=lambda model, x: model(x)[:, 0] / 0)
    with pytest.raises(ConfigurationError, match="not finite"):
        forecast(broken, [behavior])


def test_results_render() -> None:
    found = forecast(run_of(loss=curved), [first_output(), second_output()], ["frozen", "warm"])
    assert found.to_table().column_names[:4] == ["behavior", "method", "before", "predicted"]
    assert "predicted change" in repr(found)
    assert "<" in found._repr_html_()
    done = found.reshape(keep_below={"first output": 0.0}, keep_above={"second output": -10.0})
    told = found.contributions(["first output"])
    for result in (found, done, told):
        assert result.blocks()
        assert result.to_dict()
        assert "<" in result._repr_html_()
    pytest.importorskip("matplotlib")
    for result in (found, done, told):
        assert result.plot() is not None


def test_a_view_measures_behaviors_once() -> None:
    calls = [0]

    def counted(model: nn.Module, items: list[Any]) -> Tensor:
        calls[0] += 1
        return model(torch.stack(items))[:, 0]

    view = View(run_of(), [Behavior("counted", list(examples(7, 9)), counted)])
    assert view.readings is view.readings
    assert calls == [1]
