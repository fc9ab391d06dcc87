"""Shadows: with the whole batch they are the training without the earlier stage, and training does not notice them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import trainer_attrib as ta
from tests.support import support
from trainer_attrib.ledger.reader import Ledger, StageReader

SGD = {"lr": 0.05, "momentum": 0.9, "weight_decay": 1e-2}
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
    "AdamW without foreach": lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=False, amsgrad=True),
    "SGD with momentum": lambda p: torch.optim.SGD(p, **SGD),
    "Nesterov": lambda p: torch.optim.SGD(p, **SGD, nesterov=True),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2),
}


def make(normed: bool = False, drop: float = 0.0) -> Any:
    torch.manual_seed(5)
    middle = [nn.BatchNorm1d(6)] if normed else []
    return nn.Sequential(nn.Linear(4, 6), *middle, nn.Tanh(), nn.Dropout(drop), nn.Linear(6, 2))


@dataclass
class Loop:
    """A training loop over fixed batches; the same with and without a ledger."""

    optimizer: Callable[[Any], torch.optim.Optimizer] = OPTIMIZERS["AdamW"]
    clip: float | None = None
    accumulate: int = 1
    batch: int = 8
    steps: int = 5
    losses: list[Tensor] = field(default_factory=list)
    on_step: Callable[[int, Any, Any], None] = lambda step, model, recorder: None

    def run(
        self, model: Any, seed: int, ledger: Path | None = None, stage: str = "", *, tuner: Any = None, begin: int = 1,
        **options: Any,
    ) -> Any:  # fmt: skip
        """Train one stage; ``begin`` is the first step of a resumed one. Returns the optimizer."""
        tuner = tuner or self.optimizer([p for p in model.parameters() if p.requires_grad])
        schedule = torch.optim.lr_scheduler.LambdaLR(tuner, lambda step: 1 / (1 + step + begin - 1))
        generator, recorder = torch.Generator().manual_seed(seed), None
        if ledger is not None:
            recorder = ta.Recorder(ledger, stage=stage, model=model, optimizer=tuner, **{"strict": True, **options})
            recorder.start(after_step=begin - 1)
        torch.manual_seed(seed)
        try:
            for step in range(1, self.steps + 1):
                for _ in range(self.accumulate):
                    batch = {"x": torch.randn(self.batch, 4, generator=generator)}
                    batch["y"] = batch["x"][:, :2] * (seed + 1)
                    if step >= begin:
                        self._micro(model, batch, recorder)
                if step < begin:
                    continue
                if self.clip:
                    norm = nn.utils.clip_grad_norm_(model.parameters(), self.clip)
                    if recorder:
                        recorder.note_gradient_norm(norm, self.clip)
                tuner.step()
                schedule.step()
                tuner.zero_grad()
                self.on_step(step, model, recorder)
        except BaseException as error:
            if recorder:
                recorder.interrupt(str(error))
            raise
        if recorder:
            recorder.finish()
        return tuner

    def _micro(self, model: Any, batch: dict[str, Tensor], recorder: Any) -> None:
        def loss_of(part: dict[str, Tensor]) -> Tensor:
            return (model(part["x"]) - part["y"]).square().mean() / self.accumulate

        with recorder.batch(loss=loss_of, of=batch) if recorder else nullcontext():
            loss = loss_of(batch)
            loss.backward()
        self.losses.append(loss.detach())


def stage_of(ledger: Path, name: str) -> StageReader:
    return Ledger(ledger).stage(name)


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], relative: float = 1e-10) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if value.is_floating_point():
            assert float((found[name] - value).norm() / value.norm()) < relative, name
        else:
            assert torch.equal(found[name], value), name


def named(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


WHOLE = ta.Shadow("a", thin=1)

# ---- exactness ------------------------------------------------------------------------------------------------------


@support("Shadows", "plain loop")
@pytest.mark.parametrize("clip", [None, 0.3], ids=["", "clipped"])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_with_the_whole_batch_it_is_the_training_without_the_stage(
    kind: str, clip: float | None, tmp_path: Path, float64: None
) -> None:
    """Three stages: the shadow is handed on from the second to the third."""
    loop, model = Loop(OPTIMIZERS[kind], clip), make()
    other = copy.deepcopy(model)
    for seed, (stage, shadow) in enumerate((("a", ()), ("b", [WHOLE]), ("c", [WHOLE, ta.Shadow("b", thin=1)]))):
        loop.run(model, seed, tmp_path, stage, shadow=shadow)
    loop.run(other, 1)
    assert_close(stage_of(tmp_path, "b").shadow("a"), named(other))
    loop.run(other, 2)
    last = stage_of(tmp_path, "c")
    assert_close(last.shadow("a"), named(other))
    assert max(float((last.snapshot("end")[n] - v).norm() / v.norm()) for n, v in named(other).items()) > 1e-3
    without_b = make()
    loop.run(without_b, 0)
    loop.run(without_b, 2)
    assert_close(last.shadow("b"), named(without_b))
    assert last.problems() == []
    (entry, _) = last.shadows()
    assert (entry["of"], entry["status"], entry["steps"], entry["share"]) == ("a", "complete", 5, 1.0)


@pytest.mark.parametrize("kind", ["AdamW", "SGD with momentum", "Adafactor"])
def test_a_state_that_is_carried_on_is_carried_on_by_the_shadow(kind: str, tmp_path: Path, float64: None) -> None:
    """The first stage begins with a state of its own, from training that nobody recorded."""
    loop, model = Loop(OPTIMIZERS[kind]), make()
    tuner = loop.run(model, 7)
    other = copy.deepcopy(model)
    other_tuner = loop.optimizer(other.parameters())
    other_tuner.load_state_dict(copy.deepcopy(tuner.state_dict()))
    for seed, (stage, shadow) in enumerate((("a", ()), ("b", [WHOLE]), ("c", [WHOLE]))):
        for group in tuner.param_groups:
            group["lr"] = group["initial_lr"]
        loop.run(model, seed, tmp_path, stage, tuner=tuner, shadow=shadow)
    for seed in (1, 2):
        for group in other_tuner.param_groups:
            group["lr"] = group["initial_lr"]
        loop.run(other, seed, tuner=other_tuner)
        assert_close(stage_of(tmp_path, "abc"[seed]).shadow("a"), named(other))


def test_buffers_are_the_shadows_own(tmp_path: Path, float64: None) -> None:
    loop, model = Loop(), make(normed=True)
    other = copy.deepcopy(model)
    for seed, (stage, shadow) in enumerate((("a", ()), ("b", [WHOLE]), ("c", [WHOLE]))):
        loop.run(model, seed, tmp_path, stage, shadow=shadow)
    for seed in (1, 2):
        loop.run(other, seed)
        stage = stage_of(tmp_path, "abc"[seed])
        assert_close(stage.shadow("a"), named(other))
        assert_close(stage.shadow_buffers("a"), dict(other.named_buffers()))
    assert stage.problems() == []
