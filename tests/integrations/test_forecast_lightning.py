"""Forecasts of Lightning fits: exact where training is linear, and fits afterwards give the same bits."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from tests.support import support
from trainer_attrib import Behavior
from trainer_attrib.errors import ConfigurationError
from trainer_attrib.integrations.lightning import forecast

pytest.importorskip("lightning")
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers.*:UserWarning", "ignore:.*Starting from v1.9.0.*:UserWarning"
)
ROWS = 11
PACKAGES = ("lightning.pytorch", "pytorch_lightning")


def modules(package: str) -> Any:
    """A LightningModule of one of the packages; its loss is a straight line, or curved."""

    class Lit(importlib.import_module(package).LightningModule):
        def __init__(self, curved: bool = False, interval: str = "epoch", dropout: float = 0.0) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(6, 3), nn.Dropout(dropout))
            self.curved, self.interval = curved, interval

        def forward(self, x: Any) -> Any:
            return self.net(x)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            out = self(batch["x"])
            loss = nn.functional.cross_entropy(out, batch["y"]) if self.curved else -out[:, 0].mean()
            self.log("loss", loss, batch_size=len(batch["y"]))
            return loss

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
            schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.7)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": self.interval}}

    return Lit


def rows() -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(1)
    return [
        {"id": f"row {i}", "x": torch.randn(6, generator=generator) + 0.5, "y": torch.tensor(i % 3)}
        for i in range(ROWS)
    ]


@pytest.fixture
def parts(tmp_path: Path) -> Callable[..., tuple[Any, Any, Any]]:
    """Makes a trainer, a module and a loader."""

    def make(package: str = PACKAGES[0], loader: Any = None, settings: Any = None, **options: Any) -> Any:
        defaults = {
            "max_epochs": 3, "logger": False, "enable_checkpointing": False, "enable_progress_bar": False,
            "enable_model_summary": False, "accelerator": "cpu", "default_root_dir": str(tmp_path),
            "gradient_clip_val": 0.8, "accumulate_grad_batches": 2,
        }  # fmt: skip
        trainer = importlib.import_module(package).Trainer(**{**defaults, **(settings or {})})
        torch.manual_seed(3)
        module = modules(package)(**options)
        return trainer, module, DataLoader(rows(), 2, shuffle=True) if loader is None else loader

    return make


def first_class() -> Behavior:
    return Behavior("first class", [row["x"] for row in rows()], lambda m, items: m(torch.stack(items))[:, 0])


@pytest.mark.parametrize("package", [
    pytest.param(name, marks=support("Forecasts", f"{name}: fits afterwards are bit-identical")) for name in PACKAGES
])  # fmt: skip
@pytest.mark.parametrize("interval", ["epoch", "step"])
def test_a_fit_is_forecast_and_left_as_it_is(package: str, interval: str, parts: Callable) -> None:
    ended = []
    for looks in (False, True):
        trainer, module, loader = parts(package, interval=interval)
        before = first_class().values(module).mean()
        torch.manual_seed(5)
        if looks:
            weights = [p.detach().clone() for p in module.parameters()]
            found = forecast(trainer, module, loader, [first_class()], ["frozen", "warm", "gradient", "look_ahead"])
            told = found.contributions()
            assert all(torch.equal(a, b) for a, b in zip(weights, module.parameters(), strict=True))
        trainer.fit(module, loader)
        ended.append(([p.detach().clone() for p in module.parameters()], torch.get_rng_state()))
    assert all(torch.equal(a, b) for a, b in zip(ended[0][0], ended[1][0], strict=True))
    assert torch.equal(ended[0][1], ended[1][1])
    predicted = {row.method: row.predicted for row in found.rows}
    actual = float(first_class().values(module).mean() - before)
    assert predicted["frozen"] == pytest.approx(actual, rel=1e-4), "its gradients do not change"
    assert len(told.rows) == ROWS
    assert told.rows[0].id == "row 0"


def test_a_classifier(parts: Callable) -> None:
    trainer, module, loader = parts(curved=True, dropout=0.1)
    labels = Behavior.margin("right", torch.stack([row["x"] for row in rows()]), [int(r["y"]) for r in rows()])
    found = forecast(trainer, module, loader, [labels])
    before = labels.values(module).mean()
    done = found.reshape(keep_below={"right": 0.0}, how="drop", drop_at_most=0.5)
    assert 0 < done.plan.dropped.sum() <= 5
    trainer.fit(module, loader)
    actual = float(labels.values(module).mean() - before)
    assert found.rows[0].predicted == pytest.approx(actual, rel=0.5)
    assert done.after.rows[0].predicted < found.rows[0].predicted
    trainer, module, loader = parts(curved=True)
    with pytest.raises(ConfigurationError, match="leave examples out"):
        forecast(trainer, module, loader, [labels]).reshape(keep_below={"right": 0.0})


def test_what_is_refused(parts: Callable) -> None:
    class Stream(IterableDataset):
        def __iter__(self) -> Any:
            return iter(rows())

    trainer, module, _ = parts(settings={"max_epochs": -1})
    with pytest.raises(ConfigurationError, match="no known end"):
        forecast(trainer, module, DataLoader(Stream(), 2), [first_class()])
    trainer, module, _ = parts(settings={"max_steps": 3})
    found = forecast(trainer, module, DataLoader(Stream(), 2), [first_class()])
    assert found.rows[0].predicted > 0
    with pytest.raises(ConfigurationError, match="cannot be listed"):
        found.contributions()
