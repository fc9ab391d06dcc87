"""Several optimizers over one model: a step's rows hold the gradients that its optimizer used, and nothing else."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.support import support
from trainer_attrib import Analyzer, Behavior
from trainer_attrib.analysis.displacement import surviving_share
from trainer_attrib.capture.recorder import Recorder
from trainer_attrib.errors import ConfigurationError, UnsupportedLayerError
from trainer_attrib.ledger.reader import Ledger, StageReader
from trainer_attrib.tap.plan import SketchPlan
from trainer_attrib.tap.projections import Projections
from trainer_attrib.testing.oracle import project_gradient
from trainer_attrib.types import SketchConfig

RAW = SketchConfig(rank=4, dtype="float32", correction="none")
BATCH, ROUNDS = 4, 6
PLAIN = support("Training loops", "plain loop, several optimizers over disjoint parameters")


class Gan(nn.Module):
    """A generator and a discriminator."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 5))
        self.judge = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 1))

    def judge_losses(self, real: Tensor, noise: Tensor) -> Tensor:
        """Loss of the discriminator for each pair of a real and a made example, [B]."""
        made = self.generator(noise).detach()
        return (F.softplus(-self.judge(real)) + F.softplus(self.judge(made))).squeeze(1)

    def generator_losses(self, noise: Tensor) -> Tensor:
        """Loss of the generator, [B]."""
        return F.softplus(-self.judge(self.generator(noise))).squeeze(1)


def batches() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [{"real": torch.randn(BATCH, 5, generator=generator), "noise": torch.randn(BATCH, 3, generator=generator)}
            for _ in range(ROUNDS)]  # fmt: skip


def optimizers_of(model: Gan) -> list[torch.optim.Optimizer]:
    return [
        torch.optim.AdamW(model.judge.parameters(), lr=2e-2, weight_decay=0.1),
        torch.optim.SGD(model.generator.parameters(), lr=1e-1, weight_decay=0.2),
    ]


def exact(model: Gan, losses_of: Callable[[Gan], Tensor], part: str, projections: Projections) -> Tensor:
    """Each example's own gradient by autograd, of the parameters of one part, [B, width]."""
    rows = []
    for example in range(BATCH):
        named = dict(model.named_parameters())
        own = {name: p for name, p in named.items() if name.startswith(part)}
        gradients = torch.autograd.grad(losses_of(model)[example], list(own.values()))
        zeros = {name: torch.zeros_like(p) for name, p in named.items()}
        rows.append(project_gradient(projections.plan, projections, zeros | dict(zip(own, gradients, strict=True))))
    return torch.stack(rows)


class Trained:
    """A GAN trained by a plain loop, with the exact row of every step."""

    def __init__(self, ledger: Path, *, to_none: bool = True, every: int = 1, detached: bool = False,
                 sketch: SketchConfig = RAW) -> None:  # fmt: skip
        torch.manual_seed(0)
        self.model = Gan().train()
        self.optimizers = optimizers_of(self.model)
        self.ledger, self.before = ledger, []
        judge, generator = self.optimizers
        recorder = Recorder(ledger, stage="one", model=self.model, optimizer=self.optimizers, sketch=sketch,
                            strict=True, total_steps=2 * ROUNDS)  # fmt: skip
        with recorder:
            for turn, batch in enumerate(batches()):
                ids = [f"{turn}-{row}" for row in range(BATCH)]
                with recorder.batch(ids, content=batch, denominator=BATCH):
                    judge.zero_grad(set_to_none=to_none)  # discards what the generator's pass left there
                    loss = self.model.judge_losses(**batch).mean()
                    loss.backward()
                    self._keep("judge", batch, turn)
                    recorder.note_loss(loss)
                    judge.step()
                    if turn % every == 0:
                        generator.zero_grad(set_to_none=to_none)
                        if detached:
                            self.model.judge.requires_grad_(False)
                        self.model.generator_losses(batch["noise"]).mean().backward()
                        self.model.judge.requires_grad_(True)
                        self._keep("generator", batch, turn)
                        generator.step()

    def _keep(self, part: str, batch: dict[str, Tensor], turn: int) -> None:
        self.before.append((part, copy.deepcopy(self.model), batch, turn))

    def exact_rows(self) -> Tensor:
        stage = Ledger(self.ledger).stage("one")
        plan, rows = SketchPlan.from_dict(stage.meta["plan"]), []
        for version, (part, model, batch, _) in zip(stage.steps()["version"].to_pylist(), self.before, strict=True):
            projections = Projections(plan, model, stage.factors(version), version)
            losses = (
                (lambda m, b=batch: m.judge_losses(**b))
                if part == "judge"
                else (lambda m, b=batch: m.generator_losses(b["noise"]))
            )
            rows.append(exact(model, losses, part, projections))
        return torch.cat(rows).double()


def rows_of(stage: StageReader) -> tuple[list[dict[str, Any]], Tensor]:
    blocks = list(stage.rows())
    table = [row for block in blocks for row in block.table.to_pylist()]
    unit = torch.from_numpy(np.concatenate([block.sketches for block in blocks]).astype(np.float64))
    return table, unit * torch.tensor([row["norm"] for row in table]).double()[:, None]


@PLAIN
@support("Training loops", "plain loop, a GAN with and without requires_grad_(False) of the other part")
@pytest.mark.parametrize("detached", [False, True], ids=["not-toggled", "toggled"])
@pytest.mark.parametrize("every", [1, 3], ids=["alternating", "every-third-turn"])
@pytest.mark.parametrize("to_none", [True, False], ids=["to-none", "to-zeros"])
def test_a_steps_rows_hold_what_its_optimizer_used(
    to_none: bool, every: int, detached: bool, tmp_path: Path, close: Callable
) -> None:
    trained = Trained(tmp_path, to_none=to_none, every=every, detached=detached)
    stage = Ledger(tmp_path).stage("one")
    table, found = rows_of(stage)
    close(found, trained.exact_rows(), relative=1e-5)
    steps = stage.steps().to_pylist()
    numbers = [0 if part == "judge" else 1 for part, *_ in trained.before]
    assert [row["optimizer"] for row in steps] == numbers
    assert [row["step"] for row in table] == [step for step in range(1, len(steps) + 1) for _ in range(BATCH)]
    assert [row["example"] for row in table] == [f"{t}-{r}" for *_, t in trained.before for r in range(BATCH)]
    assert [row["learning_rate"] for row in steps] == [[[2e-2], [1e-1]][number] for number in numbers]
    assert max(row["audit_residual"] for row in steps) < 1e-5
    assert all(row["complete"] for row in table)


@PLAIN
def test_second_moments_are_those_of_each_optimizer(tmp_path: Path, close: Callable) -> None:
    """AdamW's part is corrected from its fourth step on; SGD has no moments, and its rows stay raw."""
    trained = Trained(tmp_path, sketch=SketchConfig(rank=4, dtype="float32"))
    stage = Ledger(tmp_path).stage("one")
    assert [o["class"] for o in stage.meta["optimizers"]] == ["torch.optim.adamw.AdamW", "torch.optim.sgd.SGD"]
    assert "SGD" in stage.meta["correction_unavailable"]
    corrected = {row["optimizer"] for row in stage.steps().to_pylist() if row["version"]}
    assert corrected == {0}
    assert set(stage.factors(1)) == {"judge.0.weight", "judge.2.weight"}
    close(rows_of(stage)[1], trained.exact_rows(), relative=1e-5)


@PLAIN
def test_only_every_nth_step_of_each_optimizer_is_captured(tmp_path: Path) -> None:
    Trained(tmp_path, sketch=SketchConfig(rank=4, correction="none", every_n_steps=2))
    stage = Ledger(tmp_path).stage("one")
    steps = stage.steps().to_pylist()
    assert [row["captured"] for row in steps] == [True, True, False, False] * 3
    assert [row["step"] for row in rows_of(stage)[0][::BATCH]] == [1, 2, 5, 6, 9, 10]


@PLAIN
@pytest.mark.parametrize("second_every", [1, 2])
def test_two_optimizers_step_on_the_same_backward(second_every: int, tmp_path: Path, close: Callable) -> None:
    """Both use the gradients of one loss; the second one those of two losses where it steps at every other."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 1)).train()
    first = torch.optim.SGD(model[0].parameters(), lr=0.1)
    second = torch.optim.Adam(model[2].parameters(), lr=1e-2)
    expected: dict[tuple[int, str], Tensor] = {}
    with Recorder(tmp_path, stage="one", model=model, optimizer=[first, second], sketch=RAW, strict=True) as recorder:
        for turn, batch in enumerate(batches()):
            ids = [f"{turn}-{row}" for row in range(BATCH)]
            with recorder.batch(ids, denominator=BATCH):
                losses = model(batch["real"]).square().squeeze(1)
            for part in (0, 2):
                plan = SketchPlan.from_dict(Ledger(tmp_path).stage("one").meta["plan"])
                own = exact(copy.deepcopy(model), lambda m, b=batch: m(b["real"]).square().squeeze(1), f"{part}.",
                            Projections(plan, model))  # fmt: skip
                expected |= {(part // 2, name): row for name, row in zip(ids, own, strict=True)}
            losses.mean().backward()
            first.step()
            first.zero_grad()
            if (turn + 1) % second_every == 0:
                second.step()
                second.zero_grad()
    stage = Ledger(tmp_path).stage("one")
    by_step = {row["step"]: row["optimizer"] for row in stage.steps().to_pylist()}
    table, found = rows_of(stage)
    close(found, torch.stack([expected[by_step[row["step"]], row["example"]] for row in table]).double(), 1e-5)
    assert len(table) == len(expected)
    assert {(by_step[row["step"]], row["example"]) for row in table} == expected.keys()
    assert max(row["audit_residual"] for row in stage.steps().to_pylist()) < 1e-5
    assert [row["audit_scale"] for row in stage.steps().to_pylist()] == pytest.approx([1] * len(by_step))


@PLAIN
def test_a_stage_of_several_optimizers_can_be_analyzed(tmp_path: Path) -> None:
    trained = Trained(tmp_path)
    stage = Ledger(tmp_path).stage("one")
    shares = {"judge.0.weight": (1 - 2e-2 * 0.1) ** ROUNDS, "generator.0.weight": (1 - 1e-1 * 0.2) ** ROUNDS}
    for name, share in shares.items():
        assert surviving_share([stage], name) == pytest.approx(share)
    behavior = Behavior("fools", [torch.ones(3)], lambda model, items: -model.generator_losses(torch.stack(items)))
    effects = Analyzer(tmp_path, trained.model).stage_effects([behavior], method=["change", "subtract"])
    torch.manual_seed(0)
    start = float(-Gan().generator_losses(torch.ones(1, 3)).detach())
    exact_effect = float(-trained.model.generator_losses(torch.ones(1, 3)).detach()) - start
    assert [e.effect for e in effects.rows] == pytest.approx([exact_effect] * 2, rel=1e-4)
    influence = Analyzer(tmp_path, trained.model).influence([behavior], recipe="grad_dot")
    assert influence.scores.shape == (1, ROUNDS * BATCH)
    assert np.isfinite(influence.scores).all()
    assert (influence.scores != 0).all()


@PLAIN
def test_what_no_optimizer_updates_is_reported_and_not_captured(tmp_path: Path, caplog: Any) -> None:
    model = Gan().train()
    optimizer = torch.optim.SGD([*model.judge.parameters(), model.generator[2].weight], lr=0.1)
    with Recorder(tmp_path, stage="one", model=model, optimizer=optimizer, sketch=RAW, strict=True) as recorder:
        for batch in batches():
            with recorder.batch(content=batch):
                model.generator_losses(batch["noise"]).mean().backward()
                optimizer.step()
                model.zero_grad()
    stage = Ledger(tmp_path).stage("one")
    nobody = "no optimizer updates it"
    assert stage.meta["plan"]["uncovered"] == {
        "generator.0.weight": nobody, "generator.0.bias": nobody, "generator.2.bias": nobody,
    }  # fmt: skip
    assert [w["name"] for w in stage.meta["plan"]["weights"]] == [
        "generator.2.weight", "judge.0.weight", "judge.2.weight",
    ]  # fmt: skip
    assert f"3 parameters not covered: {nobody}" in caplog.text
    assert max(row["audit_residual"] for row in stage.steps().to_pylist()) < 1e-5


def test_what_cannot_be_told_apart_is_refused_at_once(tmp_path: Path, files_of: Callable) -> None:
    model = Gan()
    twice = [torch.optim.SGD(model.parameters(), lr=0.1), torch.optim.SGD(model.judge.parameters(), lr=0.1)]
    with pytest.raises(ConfigurationError, match="both update a parameter of shape"):
        Recorder(tmp_path, stage="one", model=model, optimizer=twice)
    other = torch.optim.SGD(Gan().parameters(), lr=0.1)
    with pytest.raises(UnsupportedLayerError, match="no optimizer updates it"):
        Recorder(tmp_path, stage="one", model=model, optimizer=other)
    assert files_of(tmp_path) == {}


@PLAIN
def test_a_scaler_skips_the_step_of_one_optimizer_only(tmp_path: Path) -> None:
    model = Gan().train()
    judge, generator = optimizers_of(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    with Recorder(
        tmp_path, stage="one", model=model, optimizer=[judge, generator], sketch=RAW, scaler=scaler, strict=True
    ) as recorder:
        for turn, batch in enumerate(batches()):
            with recorder.batch(content=batch, denominator=BATCH):
                for part, optimizer in (("judge", judge), ("generator", generator)):
                    optimizer.zero_grad()
                    losses = model.judge_losses(**batch) if part == "judge" else model.generator_losses(batch["noise"])
                    broken = turn == 2 and part == "generator"
                    scaler.scale(losses.mean() * (float("nan") if broken else 1)).backward()
                    scaler.step(optimizer)
                scaler.update()
    stage = Ledger(tmp_path).stage("one")
    assert [(row["step"], row["optimizer"]) for row in stage.skipped_steps().to_pylist()] == [(5, 1)]
    assert [row["optimizer"] for row in stage.steps().to_pylist()] == [0, 1, 0, 1, 0, 0, 1, 0, 1, 0, 1]
    assert bool(torch.isfinite(rows_of(stage)[1]).all())
    assert stage.count("rows") == 11 * BATCH
    assert max(row["audit_residual"] for row in stage.steps().to_pylist()) < 1e-5
    assert [row["audit_scale"] for row in stage.steps().to_pylist()] == pytest.approx([1] * 11, rel=1e-4)
