"""Weights that are put into a model when its steps are over: averages kept by a callback, the best checkpoint."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainingArguments

from tests.support import support
from trainer_attrib import Analyzer, Behavior
from trainer_attrib.analysis.effects.replay import Replay
from trainer_attrib.capture.last_step import LastStep
from trainer_attrib.integrations.huggingface import AttributionCallback as HuggingFaceCallback
from trainer_attrib.integrations.lightning import AttributionCallback, Fit
from trainer_attrib.ledger.reader import Ledger

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers.*:UserWarning", "ignore:.*Starting from v1.9.0.*:UserWarning"
)
AREA = "Training loops"
AVERAGES = "Lightning, WeightAveraging and EMAWeightAveraging: a stage ends with the averages"
REPLAYED = "Lightning, WeightAveraging and EMAWeightAveraging: averaged again by replay and retrain"
PACKAGES = ("lightning.pytorch", "pytorch_lightning")
ROWS, BATCH, EPOCHS = 20, 4, 2
NOTE = "ended with other weights than its last step left"


def rows(seed: int) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        {"x": torch.randn(6, generator=generator), "labels": torch.tensor(i % 3), "id": f"{seed}/{i}"}
        for i in range(ROWS)
    ]


def module(package: str) -> Any:
    class Lit(importlib.import_module(package).LightningModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.net(x)

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            return nn.functional.cross_entropy(self.net(batch["x"]), batch["labels"])

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=0.05)

    return Lit()


def averaging(package: str, kind: str) -> Any:
    """A callback that averages over steps, exponentially, or equally from the second epoch's end."""
    found = importlib.import_module(f"{package}.callbacks.weight_averaging")
    if kind == "ema":
        return found.EMAWeightAveraging(decay=0.8)

    class OfEpochs(found.WeightAveraging):
        def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
            return epoch_idx is not None

    return OfEpochs()


def fit(package: str, lit: Any, seed: int, callbacks: list[Any], **settings: Any) -> Fit:
    """A fit of one stage, its batches drawn as the seed says."""
    torch.manual_seed(seed)
    trainer = importlib.import_module(package).Trainer(
        max_epochs=EPOCHS, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=callbacks, **settings,
    )  # fmt: skip
    return Fit(trainer, lit, DataLoader(rows(seed), BATCH, shuffle=True))


@pytest.fixture
def two_stages(tmp_path: Path) -> Callable[..., tuple[Analyzer, dict[str, Any]]]:
    def make(package: str, kind: str = "ema", first: bool = True, **settings: Any) -> tuple[Analyzer, dict[str, Any]]:
        lit, seeds = module(package), {"one": 1, "two": 2}
        for stage, seed in seeds.items():
            callbacks = [AttributionCallback(tmp_path / "ledger", stage=stage), averaging(package, kind)]
            fit(package, lit, seed, callbacks if first else callbacks[::-1], **settings).train()
        programs = {
            stage: lambda lit, seed=seed: fit(package, lit, seed, [averaging(package, kind)], **settings)
            for stage, seed in seeds.items()
        }
        return Analyzer(tmp_path / "ledger", lit), programs

    return make


@pytest.mark.parametrize("package", PACKAGES)
def test_a_stage_is_closed_before_the_module_leaves_its_device(tmp_path, package):
    """The strategy's teardown moves it to the CPU."""
    asked = fit(package, module(package), 1, [AttributionCallback(tmp_path, stage="one"), averaging(package, "ema")])
    strategy, seen = asked.trainer.strategy, list[str]()
    teardown = strategy.teardown
    strategy.teardown = lambda: (seen.append(Ledger(tmp_path).stage("one").meta["status"]), teardown())
    asked.train()
    assert seen == ["complete"]
    assert "on_train_end" not in vars(strategy)


def margins() -> Behavior:
    found = rows(9)
    return Behavior.margin("margin", torch.stack([r["x"] for r in found]), torch.stack([r["labels"] for r in found]))


@support(AREA, AVERAGES)
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("package", PACKAGES)
def test_a_stage_ends_with_the_averages_wherever_the_callback_stands(two_stages, package, first):
    analyzer, programs = two_stages(package, first=first)
    assert [stage.parent for stage in analyzer.ledger.stages()] == [None, "one"]
    assert all(stage.meta["weights_replaced"] for stage in analyzer.ledger.stages())
    assert analyzer.closure(programs).exact


@support(AREA, REPLAYED)
@pytest.mark.parametrize("settings", [{}, {"accumulate_grad_batches": 2}])
@pytest.mark.parametrize("kind", ["ema", "epochs"])
@pytest.mark.parametrize("package", PACKAGES)
def test_a_replay_of_every_step_averages_as_training_did(two_stages, package, kind, settings):
    analyzer, programs = two_stages(package, kind, **settings)
    found = analyzer.stage_effects([margins()], [Replay(1, 1, "plain"), "retrain"], programs)
    effects = {m: [r.effect for r in found.rows if (r.stage, r.method) == ("one", m)] for m in ("replay", "retrain")}
    assert effects["replay"] == effects["retrain"]
    assert any(abs(effect) > 1e-3 for effect in effects["retrain"])
    assert any(NOTE in caveat and "'two'" in caveat for caveat in found.caveats)


@support(AREA, REPLAYED)
def test_averages_make_a_difference_to_a_replay(two_stages):
    """Else the test above could not fail."""
    analyzer, programs = two_stages(PACKAGES[0])
    without = {stage: lambda lit, seed=s: fit(PACKAGES[0], lit, seed, []) for stage, s in (("one", 1), ("two", 2))}
    one, other = (
        [row.effect for row in analyzer.stage_effects([margins()], [Replay(1, 1, "plain")], given).rows]
        for given in (programs, without)
    )
    assert one != other


@support(AREA, REPLAYED)
def test_steps_that_a_larger_one_stands_for_are_averaged_too(two_stages):
    """Merged by two, an average has been made as often as by the recorded steps."""
    analyzer, programs = two_stages(PACKAGES[0])
    made: list[int] = []

    def counted(lit: Any) -> Fit:
        prepared = programs["two"](lit)
        callback = next(c for c in prepared.trainer.callbacks if type(c).__name__ == "EMAWeightAveraging")
        end = callback.on_train_end
        callback.on_train_end = lambda *args: (made.append(int(callback._average_model.n_averaged)), end(*args))
        return prepared

    analyzer.stage_effects([margins()], [Replay(2, 1)], {**programs, "two": counted})
    assert made == [EPOCHS * ROWS // BATCH] * 2


class Swap(TrainerCallback):
    """Halves the weights when training ends, as somebody's own averaging would."""

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for parameter in kwargs["model"].parameters():
            parameter.data.mul_(0.5)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = self.layers(x)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def trained(folder: Path, stage: str, net: Net, *others: TrainerCallback, **settings: Any) -> Trainer:
    arguments = TrainingArguments(
        str(folder / "out"), max_steps=8, per_device_train_batch_size=4, learning_rate=0.05, report_to=[],
        disable_tqdm=True, use_cpu=True, **{"save_strategy": "no", **settings},
    )  # fmt: skip
    data = [{key: value for key, value in row.items() if key != "id"} for row in rows(1)]
    callbacks = [HuggingFaceCallback(folder / "ledger", stage=stage), *others]
    trainer = Trainer(net, arguments, train_dataset=data, eval_dataset=data, callbacks=callbacks)
    trainer.train()
    return trainer


@support(AREA, "Hugging Face Trainer, weights that a callback puts into the model when training ends")
def test_a_callback_after_ours_may_change_the_weights_at_the_end(tmp_path):
    net = Net()
    trained(tmp_path, "one", net, Swap())
    stage = Ledger(tmp_path / "ledger").stage("one")
    assert stage.meta["status"] == "complete"
    assert stage.meta["weights_replaced"]
    assert all(torch.equal(value, net.state_dict()[name]) for name, value in stage.snapshot("end").items())


def test_a_train_that_goes_around_ours_closes_its_stage_too(tmp_path):
    """The class's ``train`` is called, so that nothing of ours is around it."""
    trainer = trained(tmp_path, "one", Net())
    Trainer.train(trainer)
    stage = Ledger(tmp_path / "ledger").stage("one.2")
    assert stage.meta["status"] == "complete"
    assert not any(module._forward_hooks for module in trainer.model.modules())


@support(AREA, "Hugging Face Trainer, load_best_model_at_end: a stage ends with the best checkpoint")
def test_the_best_checkpoint_is_the_end_of_its_stage(tmp_path):
    """Best is the largest loss here, that of the first checkpoint."""
    net = Net()
    trainer = trained(
        tmp_path, "one", net, load_best_model_at_end=True, metric_for_best_model="eval_loss", greater_is_better=True,
        save_strategy="steps", eval_strategy="steps", save_steps=4, eval_steps=4,
    )  # fmt: skip
    assert str(trainer.state.best_model_checkpoint).endswith("checkpoint-4")
    stage = Ledger(tmp_path / "ledger").stage("one")
    assert stage.meta["weights_replaced"]
    assert all(torch.equal(value, net.state_dict()[name]) for name, value in stage.snapshot("end").items())


def test_a_stage_that_ends_where_its_last_step_left_it_says_so(tmp_path):
    trained(tmp_path, "one", Net())
    assert Ledger(tmp_path / "ledger").stage("one").meta["weights_replaced"] is False


def test_weights_that_are_not_numbers_have_not_been_replaced():
    weights = [torch.tensor([1.0, torch.nan, torch.inf]), torch.zeros(0)]
    watched = LastStep(weights)
    watched.note()
    assert not watched.replaced
    weights[0].data[0] = 2.0
    assert watched.replaced


def test_weights_in_other_storage_are_looked_at_where_they_are():
    weight = nn.Parameter(torch.ones(3))
    watched = LastStep([weight])
    watched.note()
    weight.data = torch.zeros(3)
    assert watched.replaced
