"""Every optimizer's executed updates are recorded; its second moments are read right or not at all, with a reason."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.support import support
from trainer_attrib.capture import moment_readers
from trainer_attrib.capture.moment_readers import correction_unavailable, register_moments
from trainer_attrib.capture.recorder import Recorder
from trainer_attrib.ledger.reader import Ledger, StageReader
from trainer_attrib.numerics.second_moment import factor, lifted
from trainer_attrib.tap.plan import SketchPlan
from trainer_attrib.tap.projections import Projections
from trainer_attrib.testing.oracle import project_gradient, whole_weight
from trainer_attrib.testing.zoo import FrozenBias, LinearOnThreeAxes, Member
from trainer_attrib.types import SketchConfig

Make = Callable[[Any], torch.optim.Optimizer]
Moments = dict[str, Tensor]
BETAS = (0.8, 0.95)


def _other(module: str, name: str) -> Callable[..., Any]:
    """An optimizer of another package, in its training mode."""

    def make(*args: Any, **kwargs: Any) -> Any:
        optimizer = getattr(pytest.importorskip(module), name)(*args, **kwargs)
        if hasattr(optimizer, "train"):
            optimizer.train()
        return optimizer

    return make


_hf_adafactor = _other("transformers.optimization", "Adafactor")
_schedule_free = _other("schedulefree", "AdamWScheduleFree")


def _running(beta: float, *, corrected: bool = True) -> Callable[[list[Tensor]], Tensor]:
    """Exponential mean of squares, written as the sum it is."""

    def moment(gradients: list[Tensor]) -> Tensor:
        last = len(gradients)
        total = sum(((1 - beta) * beta ** (last - t) * g.square() for t, g in enumerate(gradients, 1)), torch.zeros(()))
        return total / (1 - beta**last) if corrected else total

    return moment


def _largest(gradients: list[Tensor]) -> Tensor:
    """amsgrad: the maximum is taken before the bias is corrected."""
    seen = [_running(BETAS[1], corrected=False)(gradients[:t]) for t in range(1, len(gradients) + 1)]
    return torch.stack(seen).amax(0) / (1 - BETAS[1] ** len(gradients))


def _centered(gradients: list[Tensor]) -> Tensor:
    last = len(gradients)
    mean = sum((0.1 * 0.9 ** (last - t) * g for t, g in enumerate(gradients, 1)), torch.zeros(()))
    return _running(0.9, corrected=False)(gradients) - mean.square()


def _adafactor(gradients: list[Tensor]) -> Tensor:
    """Row and column means decayed by 1 - t^-0.8, multiplied out; vectors whole."""
    means: list[Tensor] = []
    for t, g in enumerate(gradients, 1):
        now = [g.square().mean(1), g.square().mean(0)] if g.dim() == 2 else [g.square()]
        decay = 1 - t**-0.8
        means = [decay * old + (1 - decay) * new for old, new in zip(means or now, now, strict=True)]
    return means[0] if len(means) == 1 else means[0][:, None] * means[1] / means[0].mean()


ADAM = _running(BETAS[1])
# name -> (optimizer, second moment from the gradients so far, decay that is added to the gradient)
CORRECTED: dict[str, tuple[Make, Callable[[list[Tensor]], Tensor], float]] = {
    "adam": (lambda p: torch.optim.Adam(p, lr=1e-2, betas=BETAS, weight_decay=0.05), ADAM, 0.05),
    "adamw": (lambda p: torch.optim.AdamW(p, lr=1e-2, betas=BETAS, weight_decay=0.1), ADAM, 0.0),
    "adam-foreach": (lambda p: torch.optim.Adam(p, lr=1e-2, betas=BETAS, foreach=True), ADAM, 0.0),
    "adam-fused": (lambda p: torch.optim.Adam(p, lr=1e-2, betas=BETAS, fused=True), ADAM, 0.0),
    "adam-amsgrad": (lambda p: torch.optim.Adam(p, lr=1e-2, betas=BETAS, amsgrad=True), _largest, 0.0),
    "adamw-foreach": (lambda p: torch.optim.AdamW(p, lr=1e-2, betas=BETAS, foreach=True), ADAM, 0.0),
    "adamw-fused": (lambda p: torch.optim.AdamW(p, lr=1e-2, betas=BETAS, fused=True), ADAM, 0.0),
    "adamw-tensor-lr": (lambda p: torch.optim.AdamW(p, lr=torch.tensor(1e-2), betas=BETAS), ADAM, 0.0),
    "adamw-amsgrad": (lambda p: torch.optim.AdamW(p, lr=1e-2, betas=BETAS, amsgrad=True), _largest, 0.0),
    "adamw-maximize": (lambda p: torch.optim.AdamW(p, lr=1e-2, betas=BETAS, maximize=True), ADAM, 0.0),
    "nadam": (lambda p: torch.optim.NAdam(p, lr=1e-2, betas=BETAS), ADAM, 0.0),
    "radam": (lambda p: torch.optim.RAdam(p, lr=1e-2, betas=BETAS), ADAM, 0.0),
    "rmsprop": (lambda p: torch.optim.RMSprop(p, lr=1e-3, alpha=0.9), _running(0.9, corrected=False), 0.0),
    "rmsprop-centered": (lambda p: torch.optim.RMSprop(p, lr=1e-3, alpha=0.9, centered=True), _centered, 0.0),
    "adagrad": (
        lambda p: torch.optim.Adagrad(p, lr=1e-2, lr_decay=0.1, weight_decay=0.05),
        lambda gradients: torch.stack(gradients).square().sum(0),
        0.05,
    ),
    "adafactor": (lambda p: torch.optim.Adafactor(p, lr=1e-2, weight_decay=0.1), _adafactor, 0.0),
    "hf-adafactor": (
        lambda p: _hf_adafactor(p, lr=1e-2, relative_step=False, scale_parameter=False, decay_rate=-0.8),
        _adafactor,
        0.0,
    ),
    "schedule-free": (lambda p: _schedule_free(p, lr=1e-2, betas=BETAS, weight_decay=0.1), ADAM, 0.0),
    "schedule-free-loop": (lambda p: _schedule_free(p, lr=1e-2, betas=BETAS, foreach=False), ADAM, 0.0),
}
RAW: dict[str, tuple[Make, str]] = {
    "sgd": (lambda p: torch.optim.SGD(p, lr=1e-2), "SGD keeps no second moments"),
    "sgd-momentum": (lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9), "SGD keeps no second moments"),
    "sgd-nesterov": (
        lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, nesterov=True, weight_decay=0.1),
        "SGD keeps no second moments",
    ),
    "muon": (lambda p: torch.optim.Muon(p, lr=1e-2), "Muon keeps no second moments: it makes its momentum orthogonal"),
    "lion": (lambda p: _other("lion_pytorch", "Lion")(p, lr=1e-3, weight_decay=0.1), "Lion keeps no second moments"),
    "adamw-8bit": (
        lambda p: _other("bitsandbytes.optim", "AdamW8bit")(p, lr=1e-2, min_8bit_size=16),
        "AdamW8bit keeps its second moments in a packed form",
    ),
    "adamax": (lambda p: torch.optim.Adamax(p, lr=1e-2), "Adamax is not an optimizer whose state is known"),
    "schedule-free-sgd": (
        lambda p: _other("schedulefree", "SGDScheduleFree")(p, lr=1e-2),
        "SGDScheduleFree keeps no second moments",
    ),
}
ALL = {name: make for name, (make, *_) in (CORRECTED | RAW).items()}
COMBINATIONS = {
    "adam": "Adam", "adam-foreach": "Adam, foreach", "adam-fused": "Adam, fused", "adam-amsgrad": "Adam, amsgrad",
    "adamw": "AdamW", "adamw-foreach": "AdamW, foreach", "adamw-fused": "AdamW, fused",
    "adamw-tensor-lr": "AdamW, learning rate in a tensor", "adamw-amsgrad": "AdamW, amsgrad",
    "adamw-maximize": "AdamW, maximize", "nadam": "NAdam", "radam": "RAdam", "rmsprop": "RMSprop",
    "rmsprop-centered": "RMSprop, centered", "adagrad": "Adagrad", "adafactor": "Adafactor of torch",
    "hf-adafactor": "Adafactor of transformers", "schedule-free": "schedule-free AdamW",
    "schedule-free-loop": "schedule-free AdamW", "sgd": "SGD", "sgd-momentum": "SGD, momentum",
    "sgd-nesterov": "SGD, Nesterov", "muon": "Muon; rows stay raw, with the reason",
    "lion": "Lion; rows stay raw, with the reason", "adamax": "Adamax; rows stay raw, with the reason",
    "adamw-8bit": "8-bit AdamW of bitsandbytes; rows stay raw, with the reason",
    "schedule-free-sgd": "schedule-free SGD; rows stay raw, with the reason",
}  # fmt: skip


def _each(names: Iterable[str]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(
        "name", [pytest.param(name, marks=support("Optimizers", COMBINATIONS[name])) for name in names]
    )


def _model(name: str) -> Member:
    return FrozenBias() if name == "muon" else LinearOnThreeAxes()  # Muon takes matrices only


def _weights(model: Member) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def _watched(make: Make, model: Member, decay: float, gradients: dict[str, list[Tensor]]) -> Make:
    """The optimizer, with the gradients that its steps use kept on the side: some overwrite them."""

    def made(parameters: Any) -> torch.optim.Optimizer:
        optimizer = make(parameters)

        def keep(*_: Any) -> None:
            for key, p in model.named_parameters():
                if p.grad is not None:
                    gradients.setdefault(key, []).append((p.grad + decay * p.detach()).double())

        optimizer.register_step_pre_hook(keep)
        return optimizer

    return made


def _plan(stage: StageReader) -> SketchPlan:
    return SketchPlan.from_dict(stage.meta["plan"])


@_each(ALL)
def test_differences_of_projected_weights_are_the_executed_update(
    name: str, tmp_path: Path, train: Callable, close: Callable
) -> None:
    model, history = _model(name), []
    train(model, tmp_path, steps=6, clip=5.0, optimizer=ALL[name], sketch=SketchConfig(rank=4), strict=True,
          watch=lambda step, model, optimizer: history.append(_weights(model)))  # fmt: skip
    stage = Ledger(tmp_path).stage("one")
    raw = Projections(_plan(stage), model)
    rows = stage.steps()["projected_weights"].to_pylist()
    stored = [torch.from_numpy(np.frombuffer(row, np.float32).copy()).double() for row in rows]
    for before, after, first, second in zip(history, history[1:], stored, stored[1:], strict=False):
        update = {key: after[key].double() - before[key].double() for key in after}
        close((second - first).float(), project_gradient(raw.plan, raw, update).float(), relative=1e-4)


@_each(ALL)
def test_rows_explain_the_gradients_that_the_step_used(name: str, tmp_path: Path, train: Callable) -> None:
    """Also where ``step`` leaves something else in ``.grad``."""
    model = _model(name)
    gradients: dict[str, list[Tensor]] = {}
    train(model, tmp_path, steps=4, optimizer=_watched(ALL[name], model, 0.0, gradients), strict=True)
    stage = Ledger(tmp_path).stage("one")
    assert stage.meta["coverage"]["partial"] == {}
    assert all(residual < 1e-5 for residual in stage.steps()["audit_residual"].to_pylist())
    norms = [torch.cat([g[k].flatten() for g in gradients.values()]).norm() for k in range(4)]
    assert stage.steps()["gradient_norm"].to_pylist() == pytest.approx([float(norm) for norm in norms], rel=1e-5)


@_each(CORRECTED)
def test_stored_factors_are_those_of_the_documented_moment(
    name: str, tmp_path: Path, train: Callable, close: Callable
) -> None:
    make, moment, decay = CORRECTED[name]
    model = LinearOnThreeAxes()
    gradients: dict[str, list[Tensor]] = {}
    train(model, tmp_path, steps=13, optimizer=_watched(make, model, decay, gradients), strict=True)
    stage = Ledger(tmp_path).stage("one")
    assert stage.meta["correction_unavailable"] == ""
    # RAdam does not divide by the second moment before its step 6
    steps = [version["after_step"] for version in stage.meta["versions"]]
    assert steps == ([6, 12] if name == "radam" else [4, 12])
    assert stage.steps()["version"].to_pylist()[-1] == 2
    for version, step in enumerate(steps, 1):
        found = stage.factors(version)
        for weight in _plan(stage).weights:
            moments = {key: moment(gradients[key][:step]) for key in (weight.name, weight.bias)}
            means = lifted(*factor(whole_weight(weight, moments)), floor=1 / step)
            for side, expected in zip(found[weight.name], means, strict=True):
                close(side, expected, relative=2e-5)


@_each(RAW)
def test_without_second_moments_rows_stay_raw_and_the_reason_is_stored(
    name: str, tmp_path: Path, train: Callable
) -> None:
    make, reason = RAW[name]
    train(_model(name), tmp_path, steps=6, optimizer=make, strict=True)
    stage = Ledger(tmp_path).stage("one")
    assert stage.meta["correction_unavailable"].startswith(reason)
    assert set(stage.steps()["version"].to_pylist()) == {0}
    assert stage.meta["versions"] == []


class Lookalike(torch.optim.SGD):
    """Divides by nothing, but keeps something under AdamW's names."""

    def step(self, closure: Any = None) -> None:
        super().step(closure)
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p] |= {"step": torch.tensor(1.0), "exp_avg_sq": torch.full_like(p, 7.0)}


class AdamWithItsOwnStep(torch.optim.AdamW):
    """May do anything in its step."""

    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


class AdamWithOtherDefaults(torch.optim.AdamW):
    """Still AdamW."""


def test_an_optimizer_is_known_by_its_class_and_not_by_its_state(tmp_path: Path, train: Callable) -> None:
    train(LinearOnThreeAxes(), tmp_path, steps=5, optimizer=lambda p: Lookalike(p, lr=0.1), strict=True)
    assert Ledger(tmp_path).stage("one").meta["versions"] == []
    p = [torch.nn.Parameter(torch.ones(2, 2))]
    assert "AdamWithItsOwnStep is not an optimizer whose state is known" in correction_unavailable(
        AdamWithItsOwnStep(p)
    )
    assert correction_unavailable(AdamWithOtherDefaults(p)) == ""


@pytest.mark.parametrize(
    ("module", "name"), [("bitsandbytes.optim.adamw", "AdamW8bit"), ("torchao.optim.adam", "AdamW4bit")]
)
def test_packed_second_moments_are_not_read(module: str, name: str, tmp_path: Path, train: Callable) -> None:
    """A stand-in under the real name: neither package is needed to say no."""
    kind = type(name, (Lookalike,), {"__module__": module})
    train(LinearOnThreeAxes(), tmp_path, steps=5, optimizer=lambda p: kind(p, lr=0.1), strict=True)
    stage = Ledger(tmp_path).stage("one")
    assert stage.meta["correction_unavailable"].startswith(f"{name} keeps its second moments in a packed form")
    assert stage.meta["versions"] == []


def test_registered_names_are_those_of_the_installed_packages() -> None:
    """A name nobody has is a reader nobody uses."""
    for name in {**moment_readers._READERS, **moment_readers._WITHOUT}:
        module, _, kind = name.rpartition(".")
        if module.split(".")[0] != "torch":
            pytest.importorskip(module.split(".")[0])
            assert isinstance(getattr(importlib.import_module(module), kind), type)
    for kind in (torch.optim.SGD, torch.optim.Muon):
        assert moment_readers._qualified(kind) in moment_readers._WITHOUT


@support("Optimizers", "one's own optimizer, by the registry")
def test_ones_own_optimizer_can_be_registered(
    tmp_path: Path, train: Callable, close: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(moment_readers, "_READERS", dict(moment_readers._READERS))
    register_moments(Lookalike, lambda state, group: state["exp_avg_sq"] * 2)
    train(LinearOnThreeAxes(), tmp_path, steps=5, optimizer=lambda p: Lookalike(p, lr=0.01), strict=True)
    rows, columns = Ledger(tmp_path).stage("one").factors(1)["first.weight"]
    close(rows, torch.full_like(rows, 14.0), relative=1e-12)
    close(columns, torch.full_like(columns, 14.0), relative=1e-12)


def test_a_state_that_its_reader_does_not_know_is_a_reason_and_not_a_fault(
    tmp_path: Path, train: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(moment_readers, "_READERS", dict(moment_readers._READERS))
    register_moments(Lookalike, lambda state, group: state["renamed"])
    train(LinearOnThreeAxes(), tmp_path, steps=9, optimizer=lambda p: Lookalike(p, lr=0.01), strict=True)
    stage = Ledger(tmp_path).stage("one")
    assert stage.meta["correction_unavailable"].startswith("Lookalike's state has no 'renamed'")
    assert (stage.meta["status"], stage.meta["versions"]) == ("complete", [])


def test_a_learning_rate_that_the_optimizer_makes_itself_is_unknown(tmp_path: Path, train: Callable) -> None:
    train(LinearOnThreeAxes(), tmp_path, steps=5, optimizer=lambda p: _hf_adafactor(p), strict=True)
    stage = Ledger(tmp_path).stage("one")
    assert all(np.isnan(row[0]) for row in stage.steps()["learning_rate"].to_pylist())
    assert stage.meta["optimizers"][0]["groups"][0]["settings"]["lr"] is None
    assert len(stage.meta["versions"]) == 1


@pytest.mark.parametrize("positional", [True, False])
def test_gradients_made_inside_the_step_are_seen_and_what_it_leaves_is_untouched(
    positional: bool, tmp_path: Path
) -> None:
    """Lightning computes the gradients in a closure, and schedule-free optimizers overwrite them."""
    left: list[list[Tensor]] = []
    for ledger in (None, tmp_path):
        torch.manual_seed(0)
        model = LinearOnThreeAxes()
        optimizer = _schedule_free(model.parameters(), lr=1e-2)
        inputs = model.inputs(torch.Generator().manual_seed(0), 4)
        recorder = ledger and Recorder(ledger, stage="one", model=model, optimizer=optimizer, strict=True)

        def closure(model: Any = model, optimizer: Any = optimizer, inputs: Any = inputs) -> Tensor:
            optimizer.zero_grad()
            loss = model.losses([model(**inputs[0])], inputs).mean()
            loss.backward()
            return loss

        with recorder or nullcontext():
            for _ in range(3):
                _ = optimizer.step(closure) if positional else optimizer.step(closure=closure)
        left.append(
            [p.grad.clone() for p in model.parameters() if p.grad is not None]
            + [p.detach() for p in model.parameters()]
        )
    assert all(torch.equal(a, b) for a, b in zip(*left, strict=True))
    stage = Ledger(tmp_path).stage("one")
    assert all(residual < 1e-5 for residual in stage.steps()["audit_residual"].to_pylist())
