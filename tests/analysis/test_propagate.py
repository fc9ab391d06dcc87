"""Displacements carried through later stages, against retraining where the two must agree."""

from __future__ import annotations

import copy
import itertools
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.analysis.looped import Looped, network
from tests.analysis.stages import STAGES, margins, record_loops, three_stages
from trainer_attrib import Analyzer, Behavior
from trainer_attrib.analysis.effects.between_snapshots import BetweenSnapshots
from trainer_attrib.analysis.effects.lineage import Lineage
from trainer_attrib.analysis.effects.passage import Passage
from trainer_attrib.analysis.effects.pieces import SHORTER_FIRST, WINDOWS, Effort, pieces_of
from trainer_attrib.analysis.effects.propagate import Propagate
from trainer_attrib.analysis.effects.recorded import Subtract
from trainer_attrib.analysis.effects.retrain import Retrain
from trainer_attrib.analysis.effects.side_by_side import Displaced
from trainer_attrib.analysis.effects.slopes import gradients, inner
from trainer_attrib.analysis.loops import Loop
from trainer_attrib.analysis.programs import Losses, Step
from trainer_attrib.errors import MissingProgramError, NotComparableError

pytestmark = pytest.mark.usefixtures("float64")
WHOLE = {"products": 12, "batches": 1000, "thin": 1}
"""Every step a piece of its own with its own batch; enough products for all directions of these small models."""
KINDS = {
    "sgd": lambda parameters, lr: torch.optim.SGD(parameters, lr=lr),
    "momentum": lambda parameters, lr: torch.optim.SGD(parameters, lr=lr, momentum=0.9, weight_decay=0.1),
    "nesterov": lambda parameters, lr: torch.optim.SGD(parameters, lr=lr, momentum=0.9, nesterov=True),
    "adamw": lambda parameters, lr: torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.99), weight_decay=0.1),
    "adam": lambda parameters, lr: torch.optim.Adam(parameters, lr=lr, weight_decay=0.1),
}


class Sum(nn.Module):
    """Two linear parts side by side: squares of it are a quadratic loss of both together."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.left, self.right = nn.Linear(4, 2), nn.Linear(3, 2, bias=False)

    def forward(self, x):
        return self.left(x[:, :4]) + self.right(x[:, 4:])


def regression(stage: str, kind: str, lr: float, steps: int = 12, trained: str = ""):
    """A program: batches of 5 of 20 rows, which only the parts whose name begins with ``trained`` learn."""
    generator = torch.Generator().manual_seed(STAGES.index(stage))
    x, y = torch.randn(20, 7, generator=generator), torch.randn(20, 2, generator=generator)

    def program(model):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.startswith(trained))
        return Loop(
            model, lambda m, batch: (m(batch[0]) - batch[1]).square().mean(),
            [(x[i : i + 5], y[i : i + 5]) for i in range(0, 20, 5)],
            lambda m: KINDS[kind]([p for p in m.parameters() if p.requires_grad], lr), steps,
        )  # fmt: skip

    return program


def outputs() -> Behavior:
    x = torch.randn(6, 7, generator=torch.Generator().manual_seed(8))
    return Behavior("output", list(x), lambda model, items: model(torch.stack(items)).square().sum(1))


def lineage_of(ledger, model, programs, behavior) -> Lineage:
    return Analyzer(ledger, model)._view([behavior], programs)


def run(ledger, loops) -> Lineage:
    model = Sum()
    record_loops(ledger, model, loops)
    model.requires_grad_(True)
    return lineage_of(ledger, model, loops, outputs())


def flat(displacement) -> torch.Tensor:
    return torch.cat([displacement[name].reshape(-1) for name in sorted(displacement)])


def missed(lineage: Lineage, stage, method) -> float:
    """Distance from the effect of retraining, relative to it."""
    truth = torch.cat(Retrain().estimate(lineage, stage).effects)
    return float((torch.cat(method.estimate(lineage, stage).effects) - truth).norm() / truth.norm())


@pytest.mark.parametrize("kind", ["sgd", "momentum", "nesterov"])
def test_on_a_quadratic_loss_every_step_of_sgd_is_retraining(tmp_path, kind):
    """What a displacement does to the gradient does not depend on the weights there, which are interpolated."""
    loops = {s: regression(s, kind, 0.05 if kind == "sgd" else 0.005) for s in STAGES}
    lineage = run(tmp_path / "run", loops)
    stage = lineage.stages[0]
    assert missed(lineage, stage, Propagate(**WHOLE)) < 1e-10
    assert missed(lineage, stage, Subtract()) > 0.05


def test_frozen_weights_keep_their_displacement_and_drive_the_others(tmp_path):
    first = regression("first", "sgd", 0.05)
    loops = {"first": first, **{s: regression(s, "sgd", 0.01, trained="left") for s in STAGES[1:]}}
    lineage = run(tmp_path / "run", loops)
    stage = lineage.stages[0]
    found, change = Propagate(**WHOLE).estimate(lineage, stage), lineage.timeline.change(stage)
    assert missed(lineage, stage, Propagate(**WHOLE)) < 1e-10
    assert found.displacement is not None
    assert torch.equal(found.displacement["right.weight"], -change["right.weight"])
    undriven = dict(change, **{"right.weight": torch.zeros(2, 3)})
    passage = Passage(lineage, lineage.stages[1], Effort(**WHOLE))
    both, alone = (passage.forward(Displaced(one, {})).weights for one in (change, undriven))
    assert (both["left.weight"] - alone["left.weight"]).norm() > 2e-3 * alone["left.weight"].norm()
    assert found.cost <= Propagate(**WHOLE).price(lineage, stage)


def test_a_first_step_of_adam_is_not_changed_by_a_displacement(tmp_path):
    """It is lr * sign(gradient): carried as it is, up to the decay."""
    loops = {s: regression(s, "adamw", 1e-3, steps=12 if s == "first" else 1) for s in STAGES}
    lineage = run(tmp_path / "run", loops)
    stage = lineage.stages[0]
    assert missed(lineage, stage, Propagate(**WHOLE)) < 1e-6
    assert missed(lineage, stage, Subtract()) < 1e-6


@pytest.mark.parametrize("kind", ["adamw", "adam"])
def test_adam_is_closer_than_leaving_the_displacement_as_it_was(tmp_path, kind):
    loops = {s: regression(s, kind, 0.03 if s == "first" else 0.003, steps=40) for s in STAGES}
    lineage = run(tmp_path / "run", loops)
    stage = lineage.stages[0]
    simple = missed(lineage, stage, Subtract())
    errors = [missed(lineage, stage, Propagate(batches=batches, thin=1)) for batches in (2, 4, 8, 16)]
    assert errors == sorted(errors, reverse=True)
    assert errors[1] < 0.25 * simple
    assert missed(lineage, stage, Propagate(**WHOLE)) < 0.005 * simple  # recorded weights are interpolated


def test_error_bars_are_small_where_the_few_batches_train_as_training_did(tmp_path):
    loops = {s: regression(s, "adamw", 0.03 if s == "first" else 0.003, steps=40) for s in STAGES}
    lineage = run(tmp_path / "run", loops)
    bars = []
    for batches in (4, 1000):
        method = Propagate(batches=batches, thin=1)
        found = method.estimate(lineage, lineage.stages[0])
        bars.append(float(found.error_bars[0].norm() / found.effects[0].norm()))
        assert bars[-1] > missed(lineage, lineage.stages[0], method)
    assert bars[0] > 0.2
    assert bars[1] < 0.01


@pytest.mark.parametrize("kind", ["momentum", "adamw"])
def test_a_long_stage_is_run_in_merged_steps(tmp_path, kind):
    """Of 130 steps, three are one."""
    rates = {"momentum": (0.005, 0.0005), "adamw": (0.03, 0.003)}[kind]
    steps = {"first": 40, "second": 130, "third": 20}
    loops = {s: regression(s, kind, rates[s != "first"], steps[s]) for s in STAGES}
    lineage = run(tmp_path / "run", loops)
    stage, method = lineage.stages[0], Propagate(**WHOLE)
    assert missed(lineage, stage, method) < 0.1 * missed(lineage, stage, Subtract())
    assert method.estimate(lineage, stage).cost == pytest.approx(2 * (44 + 20))


@pytest.mark.parametrize("kind", ["momentum", "AdamW"])
@pytest.mark.parametrize("removed", ["first", "second"])
def test_a_carried_optimizer_goes_on_from_before_the_removed_stage(tmp_path, kind, removed):
    looped = Looped(kind, scales={"second": 0.1, "third": 0.1}, carried=("second", "third"))
    analyzer = looped.analyzer(tmp_path, network(dropout=0, norm=False))
    lineage = analyzer._view([margins()], looped.programs)
    stage = analyzer.ledger.stage(removed)
    assert missed(lineage, stage, Propagate(**WHOLE)) < 5e-4
    assert missed(lineage, stage, Subtract()) > 0.02  # as with the recorded state instead


def test_gradients_are_clipped_as_training_clips_them(tmp_path):
    """With SGD, which a clipped gradient moves less; without clipping the estimate is another one."""
    settings = {"max_norm": 0.1, "accumulate": 2}
    looped = Looped("SGD", scales={"second": 0.3, "third": 0.3}, settings=settings)
    analyzer = looped.analyzer(tmp_path, network(dropout=0, norm=False))
    stage, found = analyzer.ledger.stage("first"), []
    for programs in (looped.programs, replace(looped, settings={"accumulate": 2}).programs):
        lineage = analyzer._view([margins()], programs)
        found.append(torch.cat(Propagate(**WHOLE).estimate(lineage, stage).effects))
    assert missed(analyzer._view([margins()], looped.programs), stage, Propagate(**WHOLE)) < 2e-3
    assert (found[1] - found[0]).norm() > 0.02 * found[0].norm()


def effects_of(run, method, behavior):
    result = Analyzer(run.ledger, run.model).stage_effects([behavior], method, run.loops)
    return {s: torch.tensor([r.effect for r in result.rows if r.stage == s]) for s in STAGES}


@pytest.mark.parametrize("kind", ["adamw", "sgd", "momentum"])
def test_where_later_stages_do_not_react_it_is_subtract(tmp_path, kind, monkeypatch):
    """A loss linear in the weights has no curvature: only weight decay acts on an earlier change."""
    monkeypatch.setattr("tests.analysis.stages.Classifier", lambda: nn.Sequential(nn.Linear(6, 3)))
    run = three_stages(tmp_path / "run", kind, loss=lambda out, y: out.gather(1, y[:, None]).mean())
    found, exact = (effects_of(run, m, margins()) for m in (Propagate(), "retrain"))
    for stage in STAGES:
        torch.testing.assert_close(found[stage], exact[stage], rtol=1e-9, atol=1e-10)


def test_the_last_stage_s_effect_is_its_change(tmp_path):
    run, behavior = three_stages(tmp_path / "run"), margins()
    found, change = (effects_of(run, m, behavior)["third"] for m in (Propagate(), "change"))
    assert torch.equal(found, change)


@pytest.mark.parametrize("kind", ["adamw", "sgd", "momentum"])
def test_a_classifier_s_gentle_later_stages(tmp_path, kind):
    """A network with a curved loss: not exact, but closer than without curvature."""
    run = three_stages(tmp_path / "run", kind, lr={"adamw": 0.005, "sgd": 0.1, "momentum": 0.01}[kind])
    lineage = lineage_of(run.ledger, run.model, run.loops, margins())
    for stage in lineage.stages[:2]:
        assert missed(lineage, stage, Propagate(**WHOLE)) < 0.5 * missed(lineage, stage, Subtract())


def dense(lineage: Lineage, stage) -> torch.Tensor:
    """The linear map of a stage entry by entry: product over its steps of K^1/2 exp(-P A) K^1/2, [P, P]."""
    names = sorted(lineage.timeline.change(lineage.stages[0]))
    model, record = copy.deepcopy(lineage.model), BetweenSnapshots(stage)
    shapes = [dict(model.named_parameters())[name].shape for name in names]

    def spread(named, default):
        other = torch.tensor(default)
        parts = (named.get(n, other).expand(shape) for n, shape in zip(names, shapes, strict=True))
        return torch.cat([part.reshape(-1) for part in parts])

    whole = torch.eye(sum(shape.numel() for shape in shapes))
    steps = lineage.programs[stage.name](model)
    for number, step in zip(range(stage.count("steps")), steps.steps(1), strict=False):
        span = number, number + 1
        P, K, added = (
            spread(named, default)
            for named, default in (
                (record.metric(*span), 0.0), (record.decay(*span), 1.0), (record.curvature_of_decay(*span), 0.0)
            )
        )  # fmt: skip
        A = hessian(model, step.losses[0], names) + added.diag()
        whole = K.sqrt().diag() @ torch.linalg.matrix_exp(-P[:, None] * A) @ K.sqrt().diag() @ whole
    return whole


def hessian(model, loss, names) -> torch.Tensor:
    """Of a loss that is quadratic in the weights, which is its Gauss-Newton matrix everywhere."""
    places = [dict(model.named_parameters())[name].requires_grad_(True) for name in names]
    gradient = torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss(), places, create_graph=True)])
    rows = (torch.autograd.grad(entry, places, retain_graph=True) for entry in gradient)
    return torch.stack([torch.cat([part.reshape(-1) for part in row]) for row in rows])


@pytest.mark.parametrize("trained", ["", "left"])
@pytest.mark.parametrize("kind", ["momentum", "adamw", "adam"])
def test_carrying_back_is_the_adjoint_of_the_linear_map(tmp_path, kind, trained):
    """Entry by entry, also through weights that later stages froze."""
    loops = {s: regression(s, kind, 0.01, trained="" if s == "first" else trained) for s in STAGES}
    lineage = run(tmp_path / "run", loops)
    first = lineage.stages[0]
    gradient = next(iter(gradients(lineage.model, outputs(), dict(lineage.model.named_parameters()))))
    back = Propagate(products=20, batches=1000, thin=1).carry_back(lineage, first, gradient)
    maps = [dense(lineage, later) for later in lineage.later(first)]
    torch.testing.assert_close(flat(back), maps[0].T @ maps[1].T @ flat(gradient), rtol=1e-8, atol=1e-12)
    assert (flat(back) - flat(gradient)).norm() > 1e-3 * flat(gradient).norm()


def test_forward_and_back_agree_for_small_steps_of_sgd(tmp_path):
    """What is left is of second order in the learning rate: exp(-a) back, 1 - a forward."""
    errors = {}
    for lr in (4e-3, 2e-3):
        loops = {s: regression(s, "sgd", 0.01 if s == "first" else lr) for s in STAGES}
        lineage = run(tmp_path / f"{lr}", loops)
        first, method = lineage.stages[0], Propagate(**{**WHOLE, "products": 20})
        gradient = next(iter(gradients(lineage.model, outputs(), dict(lineage.model.named_parameters()))))
        change, removal = lineage.timeline.change(first), method.carry(lineage, first).displacement
        forward, back = -inner(gradient, removal), inner(method.carry_back(lineage, first, gradient), change)
        errors[lr] = abs((forward - back) / (forward - inner(gradient, change)))
    assert errors[4e-3] < 0.05
    assert 1.7 < errors[4e-3] / errors[2e-3] < 2.3  # relative to the pull, which is of first order


def test_one_sweep_carries_a_gradient_to_the_ends_of_all_stages(tmp_path):
    loops = {s: regression(s, "momentum", 0.01) for s in STAGES}
    lineage = run(tmp_path / "run", loops)
    method = Propagate(thin=2)
    gradient = list(gradients(lineage.model, outputs(), dict(lineage.model.named_parameters())))[3]
    swept = {stage.name: back for stage, back in method.sweep(lineage, gradient)}
    assert list(swept) == list(STAGES[::-1])
    for stage in lineage.stages:
        assert torch.equal(flat(swept[stage.name]), flat(method.carry_back(lineage, stage, gradient)))


def test_the_dot_read_out_is_the_gradient_times_the_displacement(tmp_path):
    lineage = run(tmp_path / "run", {s: regression(s, "momentum", 0.01) for s in STAGES})
    found = Propagate(read_out="dot").estimate(lineage, lineage.stages[0])
    assert found.read_out == "dot"
    assert found.displacement is not None
    own = gradients(lineage.model, outputs(), dict(lineage.model.named_parameters()))
    expected = torch.tensor([-inner(gradient, found.displacement) for gradient in own])
    torch.testing.assert_close(found.effects[0], expected, rtol=1e-9, atol=0)


class Recorded:
    """As much of a recorded stage as pieces ask for."""

    name = "stage"

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def count(self, table: str) -> int:
        return self.steps


class Batches:
    """Numbers for losses, every batch cut to a share."""

    def steps(self, thin=1):
        return (Step([number], 1 / thin) for number in itertools.count())


def test_a_stage_without_a_step_has_no_piece_and_one_without_a_batch_is_an_error():
    assert pieces_of(Recorded(0), Batches(), Effort(2, 2.0, 4)) == []
    with pytest.raises(NotComparableError, match="'stage' gave no batch"):
        pieces_of(Recorded(3), Losses([], nn.Linear(1, 1)), Effort(2, 2.0, 4))


@pytest.mark.parametrize("total", [1, 2, 7, 60, WINDOWS, WINDOWS + 1, 1000, 12345])
@pytest.mark.parametrize("batches", [0.1, 2.0, 1e6])
def test_pieces_cover_a_stage_once_in_whole_merged_steps(total, batches):
    effort = Effort(2, batches, 4)
    found = pieces_of(Recorded(total), Batches(), effort)
    assert [piece.first for piece in found] == [0, *(piece.last for piece in found[:-1])]
    assert found[-1].last == total
    at_once = math.ceil(total / WINDOWS)
    assert all(piece.first % at_once == 0 and piece.first < piece.last for piece in found)
    assert all(piece.step.losses == [(piece.first + piece.last) // 2] for piece in found)
    assert sum(piece.step.share for piece in found) <= effort.worth(Recorded(total)) + 1e-9
    assert len(found) == min(4 * max(batches, 1), 4 * total, math.ceil(total / at_once))
    if total == 1000 and batches == 2:
        assert [piece.last for piece in found] == [16 * round(63 * (i / 8) ** SHORTER_FIRST) for i in range(1, 8)] + [
            1000
        ]


def test_the_price_is_at_least_the_cost_and_small(tmp_path):
    run = three_stages(tmp_path / "run")
    lineage = lineage_of(run.ledger, run.model, run.loops, margins())
    for method in (Propagate(), Propagate(6, 3, 2), Propagate(2, 0.1, 4)):
        found = method.estimate(lineage, lineage.stages[0])
        assert 0 < found.cost <= method.price(lineage, lineage.stages[0])
    whole = Propagate(thin=1).estimate(lineage, lineage.stages[1])
    assert whole.cost == pytest.approx(2 * 2)  # two batches' worth


def test_the_model_and_the_random_states_are_left_alone(tmp_path):
    run = three_stages(tmp_path / "run")
    before, state = copy.deepcopy(run.model.state_dict()), torch.get_rng_state()
    run.model.head.weight.requires_grad_(False)
    effects_of(run, Propagate(), margins())
    effects_of(run, Propagate(read_out="dot"), margins())
    assert all(torch.equal(before[name], value) for name, value in run.model.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())
    assert not run.model.head.weight.requires_grad
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in run.model.modules())


def test_what_cannot_be_propagated_is_refused_before_anything_runs(tmp_path):
    kinds = {**KINDS, "adagrad": lambda parameters, lr: torch.optim.Adagrad(parameters, lr=lr)}
    KINDS_WITH = pytest.MonkeyPatch()
    KINDS_WITH.setitem(KINDS, "adagrad", kinds["adagrad"])
    loops = {s: regression(s, "adagrad" if s == "third" else "sgd", 0.01) for s in STAGES}
    lineage = run(tmp_path / "run", loops)
    KINDS_WITH.undo()
    with pytest.raises(NotComparableError, match=r"'third' was trained by Adagrad.*\n.*\n.*replay"):
        Propagate().check(lineage, lineage.stages[0])
    Propagate().check(lineage, lineage.stages[2])
    without = Lineage(lineage.model, lineage.stages, lineage.timeline, lineage.behaviors, {})
    with pytest.raises(MissingProgramError):
        Propagate().check(without, lineage.stages[0])


def test_second_moments_are_needed_only_to_go_back(tmp_path):
    lineage = run(tmp_path / "run", {s: regression(s, "adamw", 1e-3) for s in STAGES})
    first = lineage.stages[0]
    before = Propagate().estimate(lineage, first).effects[0]
    Propagate().check_back(lineage, first)
    for entry in lineage.stages[2].meta["snapshots"]:
        entry.pop("moments", None)
    Propagate().check(lineage, first)
    assert torch.equal(Propagate().estimate(lineage, first).effects[0], before)
    with pytest.raises(NotComparableError, match="'third' has no recorded second moments"):
        Propagate().check_back(lineage, first)


def test_a_classifier_of_losses_alone_is_not_thinned(tmp_path):
    """Losses of unknown examples: two whole batches, which count as two."""
    run = three_stages(tmp_path / "run")
    x, y = run.data["third"]
    programs = {**run.loops, "third": lambda m: [lambda: F.cross_entropy(m(x[:6]), y[:6]) for _ in range(16)]}
    lineage = lineage_of(run.ledger, run.model, programs, margins())
    found = Propagate().estimate(lineage, lineage.stages[1])
    assert found.cost == pytest.approx(2 * 2)
    assert missed(lineage_of(run.ledger, run.model, run.loops, margins()), lineage.stages[1], Propagate()) > 0
