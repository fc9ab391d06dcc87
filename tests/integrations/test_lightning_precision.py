"""Lightning with a gradient scaler, in half precision throughout, and with the two optimizers of a GAN."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch import nn
from torch.utils.data import DataLoader

from tests.integrations.test_lightning import BATCH, ROWS, assert_nothing_left, callback, data, fit, rows_of, stage_of
from tests.integrations.test_lightning import trainer_of as trainer_for
from tests.support import support

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers.*:UserWarning", "ignore:.*Starting from v1.9.0.*:UserWarning",
    "ignore:.*Precision 16-mixed is not supported.*:UserWarning",
)  # fmt: skip
PACKAGE = "lightning.pytorch"
EPS = {"bf16": torch.finfo(torch.bfloat16).eps, "16": torch.finfo(torch.float16).eps}


def scaled() -> dict[str, Any]:
    """Lightning's own plugin with a CPU's scaler; its first scale overflows float16."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**19, growth_interval=4)
    return {"plugins": [MixedPrecision("16-mixed", "cpu", scaler)]}


@support("Precision and compilation", "Lightning, precision='16-mixed' (a CPU's scaler)")
@pytest.mark.parametrize("manual", [0, 1], ids=["automatic", "manual"])
def test_a_scaler_leaves_training_alone_and_its_skipped_steps_are_none(manual: int, tmp_path: Path) -> None:
    plain = fit(tmp_path, [], manual=manual, **scaled())
    recorded = fit(tmp_path, [callback(tmp_path)], manual=manual, **scaled())
    assert torch.equal(plain["losses"], recorded["losses"])
    assert all(torch.equal(p, recorded["weights"][key]) for key, p in plain["weights"].items())
    assert torch.equal(plain["random"], recorded["random"])
    assert_nothing_left(recorded["trainer"], recorded["module"])
    assert "step" not in vars(recorded["trainer"].precision_plugin.scaler)
    stage = stage_of(tmp_path)
    steps, skipped = stage.steps().to_pylist(), stage.skipped_steps().to_pylist()
    assert len(skipped) >= 1
    assert len(steps) + len(skipped) == recorded["trainer"].global_step == 6
    assert stage.count("rows") == BATCH * len(steps)
    assert max(row["audit_residual"] for row in steps) < EPS["16"]
    assert all(abs(row["audit_scale"] - 1) < EPS["16"] for row in steps)
    overflowed = {row["step"] + before for before, row in enumerate(skipped)}
    losses = [loss for batch, loss in enumerate(recorded["losses"].tolist()) if batch not in overflowed]
    assert [row["loss"] for row in steps] == pytest.approx(losses, rel=1e-6)


@support("Precision and compilation", "Lightning, precision='16-mixed' (a CPU's scaler)")
def test_rows_do_not_carry_the_scale(tmp_path: Path) -> None:
    """The same rows, up to float16, as without mixed precision, whatever the scale was."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**6, growth_interval=1)
    half = callback(tmp_path / "half")
    fit(tmp_path, [half], dropout=0.0, max_epochs=1, plugins=[MixedPrecision("16-mixed", "cpu", scaler)])
    fit(tmp_path, [callback(tmp_path / "full")], dropout=0.0, max_epochs=1)
    found, expected = (rows_of(stage_of(tmp_path / name))[0] for name in ("half", "full"))
    assert scaler.get_scale() > 2**6
    assert [row["example"] for row in found] == [row["example"] for row in expected]
    assert [row["norm"] for row in found] == pytest.approx([row["norm"] for row in expected], rel=5e-3)
    assert [row["denominator"] for row in found] == [row["denominator"] for row in expected]


@support("Precision and compilation", "Lightning, precision='bf16-true'")
@support("Precision and compilation", "Lightning, precision='64-true'")
@pytest.mark.parametrize(("precision", "limit"), [("bf16-true", EPS["bf16"]), ("64-true", 1e-10)])
def test_true_precisions_are_bit_identical_and_audited(precision: str, limit: float, tmp_path: Path) -> None:
    plain = fit(tmp_path, [], precision=precision)
    recorded = fit(tmp_path, [callback(tmp_path)], precision=precision)
    assert all(torch.equal(p, recorded["weights"][key]) for key, p in plain["weights"].items())
    assert torch.equal(plain["losses"], recorded["losses"])
    stage = stage_of(tmp_path)
    steps = stage.steps().to_pylist()
    assert stage.count("rows") == 2 * ROWS
    assert max(row["audit_residual"] for row in steps) < limit
    assert all(abs(row["audit_scale"] - 1) < limit for row in steps)
    assert rows_of(stage)[1].dtype == "float32"


class Gan(pl.LightningModule):
    """Two optimizers that take turns in a batch, as in Lightning's own example."""

    def __init__(self, toggle: bool) -> None:
        super().__init__()
        self.automatic_optimization, self.toggle = False, toggle
        self.generator = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 6))
        self.judge = nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 1))
        self.gradients: list[dict[str, torch.Tensor]] = []

    def training_step(self, batch: Any, batch_idx: int) -> None:
        x = batch["x"]
        first, second = self.optimizers()
        self._turn(first, nn.functional.softplus(-self.judge(self.generator(x))).mean)
        made = self.generator(x).detach()
        self._turn(second, (nn.functional.softplus(-self.judge(x)) + nn.functional.softplus(self.judge(made))).mean)

    def _turn(self, optimizer: Any, loss: Any) -> None:
        if self.toggle:
            self.toggle_optimizer(optimizer)
        optimizer.zero_grad()
        self.manual_backward(loss())
        self.gradients.append({name: p.grad.clone() for name, p in self.named_parameters() if p.grad is not None})
        optimizer.step()
        if self.toggle:
            self.untoggle_optimizer(optimizer)

    def configure_optimizers(self) -> Any:
        return [torch.optim.AdamW(self.generator.parameters(), lr=1e-2),
                torch.optim.SGD(self.judge.parameters(), lr=1e-1)]  # fmt: skip


@support("Training loops", "Lightning, several optimizers")
@pytest.mark.parametrize("toggle", [True, False], ids=["toggled", "not-toggled"])
def test_each_step_of_a_gan_has_the_rows_of_its_optimizer(toggle: bool, tmp_path: Path) -> None:
    def run(callbacks: list[Any], ledger: Path) -> tuple[Any, Gan]:
        torch.manual_seed(3)
        module = Gan(toggle)
        loader = DataLoader(data().dataset, batch_size=BATCH)
        trainer = trainer_for(PACKAGE, ledger, callbacks)
        trainer.fit(module, loader)
        return trainer, module

    _, plain = run([], tmp_path)
    trainer, module = run([callback(tmp_path)], tmp_path)
    assert all(torch.equal(p, q) for p, q in zip(plain.parameters(), module.parameters(), strict=True))
    assert_nothing_left(trainer, module)
    stage = stage_of(tmp_path)
    steps, (rows, sketches) = stage.steps().to_pylist(), rows_of(stage)
    assert len(steps) == trainer.global_step == 12
    assert [row["optimizer"] for row in steps] == [0, 1] * 6
    assert [row["learning_rate"] for row in steps] == [[1e-2], [1e-1]] * 6
    assert [row["step"] for row in rows] == [step for step in range(1, 13) for _ in range(BATCH)]
    assert max(row["audit_residual"] for row in steps) < 1e-5
    assert all(abs(row["audit_scale"] - 1) < 1e-5 for row in steps)
    assert all(row["complete"] for row in rows)
    plan = {weight["name"]: weight for weight in stage.meta["plan"]["weights"]}
    for row, sketch in zip(rows, sketches, strict=True):
        part = "generator" if steps[row["step"] - 1]["optimizer"] == 0 else "judge"
        for name, weight in plan.items():
            size = abs(sketch[weight["offset"] : weight["offset"] + weight["left"] * weight["right"]]).max()
            assert (size > 0) == name.startswith(part)
    assert [o["class"].rpartition(".")[2] for o in stage.meta["optimizers"]] == ["AdamW", "SGD"]
    assert [s["step"] for s in stage.meta["snapshots"]] == [0, 3, 6, 9, 12]
