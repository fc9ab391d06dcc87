"""Lightning fits driven from outside: the weights that fit() gives, bit for bit; thinned steps; what is refused."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from trainer_attrib.analysis.programs import Steps, steps_of
from trainer_attrib.errors import ConfigurationError
from trainer_attrib.integrations.lightning import Fit

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers.*:UserWarning", "ignore:.*Starting from v1.9.0.*:UserWarning"
)
ROWS = 11
PACKAGES = ("lightning.pytorch", "pytorch_lightning")


def modules(package: str) -> Any:
    """A LightningModule of one of the packages, whose loss depends on where training is."""

    class Lit(importlib.import_module(package).LightningModule):
        def __init__(self, optimizer: str = "AdamW", dropout: float = 0.2, result: str = "tensor") -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 3))
            self.optimizer, self.result = optimizer, result

        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return {**batch, "x": batch["x"] + 0.1 * torch.rand_like(batch["x"])}

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = nn.functional.cross_entropy(self.net(batch["x"]), batch["y"])
            loss = loss * (1 + self.global_step + 0.5 * self.current_epoch + 0.25 * batch_idx)
            self.log("loss", loss, batch_size=len(batch["y"]))
            self.log_dict({"also": loss}, batch_size=len(batch["y"]))
            return {"tensor": loss, "dict": {"loss": loss, "more": 1}, "none": None}[self.result]

        def configure_optimizers(self) -> Any:
            optimizer = getattr(torch.optim, self.optimizer)(self.parameters(), lr=1e-2)
            return {"optimizer": optimizer} if self.result == "dict" else [optimizer]

    return Lit


def rows() -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [{"x": torch.randn(6, generator=generator), "y": torch.tensor(i % 3)} for i in range(ROWS)]


class Stream(IterableDataset):
    def __iter__(self) -> Any:
        return iter(rows())


@pytest.fixture
def fit(tmp_path: Path) -> Callable[..., Fit]:
    """Makes fits of 11 rows in batches of 2 that have not run."""

    def make(package: str = PACKAGES[0], module: Any = None, loader: Any = None, **settings: Any) -> Fit:
        defaults = {
            "max_epochs": 3, "logger": False, "enable_checkpointing": False, "enable_progress_bar": False,
            "enable_model_summary": False, "accelerator": "cpu", "default_root_dir": str(tmp_path),
        }  # fmt: skip
        trainer = importlib.import_module(package).Trainer(**{**defaults, **settings})
        torch.manual_seed(3)
        module = modules(package)() if module is None else module()
        return Fit(trainer, module, DataLoader(rows(), 2, shuffle=True) if loader is None else loader())

    return make


def check_equal(make: Callable[[], Fit]) -> list[int]:
    """Driving gives fit()'s weights and leaves fit()'s random state; returns the micro-batches of every step."""
    trained, driven = make(), make()
    torch.manual_seed(5)
    trained.train()
    after = torch.get_rng_state()
    torch.manual_seed(5)
    steps = steps_of(driven)
    assert isinstance(steps, Steps)
    assert steps.model is driven.model
    optimizer, counts = steps.optimizer(), []
    for step in itertools.islice(steps.steps(), trained.trainer.global_step):
        optimizer.zero_grad()
        for loss in step.losses:
            loss().backward()
        steps.clip()
        optimizer.step()
        counts.append(len(step.losses))
        assert step.share == 1.0
    assert torch.equal(after, torch.get_rng_state())
    initial = dict(make().model.named_parameters())
    mine = dict(driven.model.named_parameters())
    for name, weight in trained.model.named_parameters():
        assert torch.equal(weight, mine[name]), name
        assert name.endswith("bias") or not torch.equal(weight, initial[name].to(weight))
    assert (driven.trainer.global_step, driven.trainer.current_epoch) == (0, 0)
    assert "log" not in driven.model.__dict__
    return counts


SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulated and clipped": {"accumulate_grad_batches": 4, "gradient_clip_val": 0.2},
    "clipped by value": {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
    "bf16-mixed": {"precision": "bf16-mixed", "accumulate_grad_batches": 2},
    "bf16-true": {"precision": "bf16-true"},
    "64-true": {"precision": "64-true"},
    "limited to a number": {"limit_train_batches": 3, "accumulate_grad_batches": 2},
    "limited to a part": {"limit_train_batches": 0.6},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_driving_gives_the_weights_of_fit(name: str, fit: Callable) -> None:
    counts = check_equal(lambda: fit(**SETTINGS[name]))
    if name == "accumulated and clipped":
        assert counts == [4, 2] * 3


@pytest.mark.parametrize("package", PACKAGES)
def test_other_optimizers_results_and_packages(package: str, fit: Callable) -> None:
    make = modules(package)
    check_equal(lambda: fit(package, lambda: make("SGD", result="dict"), accumulate_grad_batches=3))


def test_a_schedule_that_asks_for_the_number_of_steps(fit: Callable) -> None:
    """Its rates are not driven here, its optimizer is."""

    class Own(modules(PACKAGES[0])):
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
            rates = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0, int(self.trainer.estimated_stepping_batches))
            assert rates.total_iters == 18
            return [optimizer], [{"scheduler": rates, "interval": "step"}]

    check_equal(lambda: fit(module=Own))


def test_a_stream(fit: Callable) -> None:
    counts = check_equal(lambda: fit(loader=lambda: DataLoader(Stream(), 2), accumulate_grad_batches=4))
    assert counts == [4, 2] * 3


def test_clipping_of_ones_own(fit: Callable) -> None:
    base = modules(PACKAGES[0])

    class Own(base):
        def configure_gradient_clipping(self, optimizer: Any, *args: Any, **kwargs: Any) -> None:
            self.clip_gradients(optimizer, gradient_clip_val=0.1, gradient_clip_algorithm="norm")

    check_equal(lambda: fit(module=Own))


def test_a_loss_can_be_computed_again_and_differentiated_twice(fit: Callable) -> None:
    """What a hook changed at random is kept."""
    run = fit(module=lambda: modules(PACKAGES[0])(dropout=0.0))
    loss = next(run.steps()).losses[0]
    assert loss().item() == loss().item()
    weights = list(run.model.parameters())
    gradient = torch.autograd.grad(loss(), weights, create_graph=True)
    flat = torch.cat([g.flatten() for g in gradient])
    second = torch.autograd.grad(flat @ flat.detach(), weights)
    assert float(torch.cat([s.flatten() for s in second]).norm()) > 0


@pytest.mark.parametrize(("thin", "accumulate", "count"), [(2, 1, 1), (2, 4, 2), (4, 4, 1), (8, 4, 1), (50, 1, 1)])
def test_thinned_steps_are_means_over_what_is_kept(thin: int, accumulate: int, count: int, fit: Callable) -> None:
    """A shorter last step counts for less in Lightning, whatever is kept of it."""

    class Plain(modules(PACKAGES[0])):
        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return batch

        def training_step(self, batch: Any) -> Any:
            seen.append(batch)
            return nn.functional.cross_entropy(self.net(batch["x"]), batch["y"])

    run = fit(
        module=lambda: Plain(dropout=0.0).double(),
        loader=lambda: DataLoader([{"x": row["x"].double(), "y": row["y"]} for row in rows()], 2),
        accumulate_grad_batches=accumulate,
    )
    seen: list[Any] = []
    x, kept_ever = torch.stack([row["x"] for row in rows()]).double(), set()
    for number, step in enumerate(itertools.islice(run.steps(thin), 48)):
        seen.clear()
        found = torch.autograd.grad(sum(loss() for loss in step.losses), list(run.model.parameters()))
        kept = [[int((x == row).all(1).nonzero()) for row in batch["x"]] for batch in seen]
        size = ([4, 2] if accumulate == 4 else [1] * 6)[number % (2 if accumulate == 4 else 6)]
        examples = ([8, 3] if accumulate == 4 else [2] * 5 + [1])[number % (2 if accumulate == 4 else 6)]
        assert len(kept) == max(1, count * size // accumulate)
        assert step.share == sum(map(len, kept)) / examples
        means = [
            nn.functional.cross_entropy(run.model.net(x[i]), torch.tensor(i) % 3) * size / accumulate for i in kept
        ]
        expected = torch.autograd.grad(sum(means) / len(means), list(run.model.parameters()))
        for mine, theirs in zip(found, expected, strict=True):
            assert torch.allclose(mine, theirs, rtol=1e-12, atol=1e-15)
        kept_ever |= set(itertools.chain(*kept))
    assert kept_ever == set(range(ROWS))


def manual() -> Any:
    module = modules(PACKAGES[0])()
    module.automatic_optimization = False
    return module


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "manual optimization": ({"module": manual}, "optimizes by itself"),
    "several loaders": ({"loader": lambda: [DataLoader(rows())]}, "one loader"),
    "no loader": ({"loader": lambda: 3}, "one loader"),
    "overfit_batches": ({"overfit_batches": 2}, "overfit"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_driven_is_refused(name: str, fit: Callable) -> None:
    settings, reason = REFUSED[name]
    with pytest.raises(ConfigurationError, match=reason):
        next(fit(**settings).steps())


def test_fp16_is_refused(fit: Callable) -> None:
    run = fit()
    run.trainer.precision_plugin.scaler = torch.amp.GradScaler("cpu")
    with pytest.raises(ConfigurationError, match="fp16"):
        next(run.steps())


def test_several_optimizers_and_skipped_batches_are_refused(fit: Callable) -> None:
    run = fit(module=lambda: modules(PACKAGES[0])(result="none"))
    with pytest.raises(ConfigurationError, match="NoneType"):
        next(run.steps()).losses[0]()
    run.model.configure_optimizers = lambda: [torch.optim.SGD(run.model.parameters()) for _ in range(2)]
    with pytest.raises(ConfigurationError, match="2 optimizers"):
        run.clip()
