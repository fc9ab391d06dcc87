"""Shadows beside a Trainer: the training without the earlier stage, and a training that does not notice them."""

from __future__ import annotations

import copy
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from tests.capture.test_shadow import assert_close, named, stage_of
from tests.support import support
from trainer_attrib import Shadow
from trainer_attrib.capture.shadows.replica import Replica
from trainer_attrib.errors import ConfigurationError, StageNotFoundError
from trainer_attrib.integrations.huggingface import AttributionCallback
from trainer_attrib.ledger.journal import StageJournal
from trainer_attrib.testing.leftovers import hooks_around

WHOLE = Shadow("a", thin=1)
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "accumulation": {"gradient_accumulation_steps": 2, "max_grad_norm": 0.2, "lr_scheduler_type": "cosine"},
    "sgd": {"optim": "sgd", "optim_args": "momentum=0.9", "learning_rate": 0.05, "weight_decay": 0.1},
}


class Net(nn.Module):
    """Dropout, running statistics, and a count that its forward pass keeps."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.body, self.norm, self.drop = nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.2)
        self.head, self.passes = nn.Linear(6, 3), 0

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        self.passes += 1
        x = x.to(self.body.weight.dtype)  # datasets give float32
        logits = self.head(self.drop(torch.tanh(self.norm(self.body(x)))))
        return {"loss": nn.functional.cross_entropy(logits.float(), labels), "logits": logits}


def rows(seed: int, count: int = 32) -> Dataset:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 4, generator=generator)
    label = (x[:, seed % 4] > 0).long() + (x[:, 2] > 1).long()
    items = zip(x.tolist(), label.tolist(), strict=True)
    return Dataset.from_list([{"id": f"{seed}-{i}", "x": v, "labels": y} for i, (v, y) in enumerate(items)])


class Talkative(Trainer):
    """Logs within its loss, and keeps what it has seen."""

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        self.seen = [*getattr(self, "seen", []), float(loss.detach())]
        self.log({"own": float(loss.detach())})
        return loss


def trainer_of(tmp_path: Path, model: Any, seed: int, callbacks: Any = (), **settings: Any) -> Trainer:
    defaults: dict[str, Any] = {
        "output_dir": str(tmp_path / "output"), "per_device_train_batch_size": 8, "num_train_epochs": 2, "seed": seed,
        "learning_rate": 1e-2, "weight_decay": 0.1, "save_strategy": "no", "report_to": [], "disable_tqdm": True,
        "use_cpu": True, "logging_steps": 1, "dataloader_pin_memory": False,
    }  # fmt: skip
    return Talkative(
        model, TrainingArguments(**{**defaults, **settings}), train_dataset=rows(seed), callbacks=list(callbacks)
    )


def recording(ledger: Path, stage: str, *shadow: Shadow, **options: Any) -> AttributionCallback:
    return AttributionCallback(ledger, stage=stage, shadow=shadow, **{"strict": True, **options})


def distance(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest relative one of any weight."""
    return max(float((found[name] - value).norm() / value.norm()) for name, value in expected.items())


# ---- exactness ------------------------------------------------------------------------------------------------------


@support("Shadows", "Hugging Face Trainer")
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_with_the_whole_batch_it_is_the_training_without_the_stage(name: str, tmp_path: Path, float64: None) -> None:
    """Dropout draws the same, running statistics are the shadow's own; the shadow is handed on to the third stage."""
    settings, model, ledger = CONFIGURATIONS[name], Net(), tmp_path / "ledger"
    other = copy.deepcopy(model)
    trainer_of(tmp_path, model, 0, [recording(ledger, "a")], **settings).train()
    for seed, stage in ((1, "b"), (2, "c")):
        trainer_of(tmp_path, model, seed, [recording(ledger, stage, WHOLE)], **settings).train()
        trainer_of(tmp_path, other, seed, **settings).train()
        found = stage_of(ledger, stage)
        assert_close(found.shadow("a"), named(other))
        assert_close(found.shadow_buffers("a"), dict(other.named_buffers()))
        assert found.problems() == []
    assert distance(named(model), named(other)) > 1e-2


@support("Shadows", "bf16 of TrainingArguments")
def test_mixed_precision(tmp_path: Path) -> None:
    """Gradients that were rounded to bf16 are subtracted in float32."""
    settings, model, ledger = {**CONFIGURATIONS["sgd"], "bf16": True}, Net(), tmp_path / "ledger"
    other = copy.deepcopy(model)
    trainer_of(tmp_path, model, 0, [recording(ledger, "a")], **settings).train()
    trainer_of(tmp_path, model, 1, [recording(ledger, "b", WHOLE)], **settings).train()
    trainer_of(tmp_path, other, 1, **settings).train()
    found = stage_of(ledger, "b").shadow("a")
    assert distance(found, named(other)) < 1e-5
    assert distance(named(model), named(other)) > 0.1


# ---- training is sacred ---------------------------------------------------------------------------------------------


def outcome(trainer: Trainer) -> dict[str, Any]:
    """Everything that a shadow must not change."""
    trainer.train()
    optimizer: Any = trainer.optimizer
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    states = {f"{i}.{k}": v.clone() for i, s in enumerate(optimizer.state.values()) for k, v in s.items()}
    model: Any = trainer.model
    return {
        "logs": [{k: row.get(k) for k in ("own", "loss", "grad_norm", "step")} for row in trainer.state.log_history],
        "seen": trainer.seen,  # type: ignore[attr-defined]
        "state": {k: v.clone() for k, v in model.state_dict().items()},
        "gradients": [p.grad for p in model.parameters()],
        "optimizer": states,
        "passes": model.passes,
        "training": [module.training for module in model.modules()],
        "torch": torch.get_rng_state(),
        "numpy": np.random.get_state()[1].tolist(),  # type: ignore[index]
        "python": random.getstate(),
    }


def same(first: Any, second: Any) -> bool:
    if isinstance(first, Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(value, second[key]) for key, value in first.items())
    if isinstance(first, list):
        return len(first) == len(second) and all(same(a, b) for a, b in zip(first, second, strict=True))
    return first == second


@support("Shadows", "Hugging Face Trainer")
@pytest.mark.parametrize("name", [*CONFIGURATIONS, "bf16", "workers"])
def test_training_does_not_notice(name: str, tmp_path: Path) -> None:
    """Losses, gradient norms, weights, buffers, optimizer state, attributes and all random states, with dropout."""
    settings = CONFIGURATIONS.get(name, {"bf16": True} if name == "bf16" else {"dataloader_num_workers": 1})
    model, ledger = Net(), tmp_path / "ledger"
    trainer_of(tmp_path, model, 0, [recording(ledger, "a")], **settings).train()
    other = copy.deepcopy(model)
    plain = outcome(trainer_of(tmp_path, other, 1, **settings))
    callback = recording(ledger, "b", Shadow("a", thin=2, replicas=2, every=2, device="cpu"))
    trainer = trainer_of(tmp_path, model, 1, [callback], **settings)
    shadowed = outcome(trainer)
    assert len(plain["logs"]) > 2
    assert len(plain["optimizer"]) > 0
    assert [key for key in plain if not same(plain[key], shadowed[key])] == []
    assert trainer.__dict__.keys().isdisjoint({"_prepare_inputs", "training_step"})
    entries = stage_of(ledger, "b").shadows()
    assert [(e["replica"], e["status"], e["share"]) for e in entries] == [
        (0, "complete", 0.125),
        (1, "complete", 0.125),
    ]


@pytest.mark.parametrize("what", ["Replica.compare", "Replica.step", "StageJournal.keep_shadow"])
def test_a_fault_of_a_shadow_ends_the_shadow_only(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other replica goes on, rows are recorded, training is the same, and no hook is left."""
    model, ledger = Net(), tmp_path / "ledger"
    trainer_of(tmp_path, model, 0, [recording(ledger, "a")]).train()
    other, before = copy.deepcopy(model), hooks_around(model)
    plain = outcome(trainer_of(tmp_path, other, 1))
    owner, _, name = what.partition(".")
    owner = {"Replica": Replica, "StageJournal": StageJournal}[owner]
    whole, calls = getattr(owner, name), []

    def breaks(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(self)
        if len(calls) == (5 if owner is Replica else 1):  # in step 3, or at the end, of the first replica
            raise RuntimeError("the disk is full")
        return whole(self, *args, **kwargs)

    monkeypatch.setattr(owner, name, breaks)
    callback = recording(ledger, "b", Shadow("a", thin=1, replicas=2), strict=False)
    trainer = trainer_of(tmp_path, model, 1, [callback])
    shadowed = outcome(trainer)
    assert [key for key in plain if not same(plain[key], shadowed[key])] == []
    assert hooks_around(model) == before
    stage = stage_of(ledger, "b")
    assert (stage.meta["status"], stage.count("steps")) == ("complete", 8)
    first, second = stage.shadows()
    assert (first["status"], second["status"]) == ("incomplete", "complete")
    assert first["reason"].endswith("RuntimeError: the disk is full")
    assert second["steps"] == 8
    assert stage.problems() == []
    with pytest.raises(StageNotFoundError, match="the disk is full"):
        stage.shadow("a")


def test_strict_raises_before_anything_is_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ledger = Net(), tmp_path / "ledger"
    trainer_of(tmp_path, model, 0, [recording(ledger, "a")]).train()
    before = hooks_around(model)

    def breaks(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("no memory")

    monkeypatch.setattr(Replica, "compare", breaks)
    trainer = trainer_of(tmp_path, model, 1, [recording(ledger, "b", WHOLE)])
    with pytest.raises(RuntimeError, match="no memory"):
        trainer.train()
    assert trainer.__dict__.keys().isdisjoint({"_prepare_inputs", "training_step"})
    assert hooks_around(model) == before
    stage = stage_of(ledger, "b")
    assert [(e["status"], e["reason"]) for e in stage.shadows()] == [("incomplete", "step 1: RuntimeError: no memory")]


# ---- resuming -------------------------------------------------------------------------------------------------------


class BreaksOff(TrainerCallback):
    """The machine dies after a step."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 5:
            raise KeyboardInterrupt


@support("Shadows", "Hugging Face Trainer, checkpoint and resume")
def test_a_resumed_run_has_the_shadow_of_one_that_ran_through(tmp_path: Path, float64: None) -> None:
    """From the checkpoint after step 3, in the middle of a comparison that is used twice."""
    settings = {"save_strategy": "steps", "save_steps": 3}
    model, ledger, shadow = Net(), tmp_path / "ledger", Shadow("a", thin=2, replicas=2, every=2, device="cpu")
    trainer_of(tmp_path, model, 0, [recording(ledger, "a")]).train()
    starts = [copy.deepcopy(model) for _ in range(2)]
    trainer_of(tmp_path, model, 1, [recording(ledger, "whole", shadow)]).train()
    with pytest.raises(KeyboardInterrupt):
        trainer_of(tmp_path, starts[0], 1, [recording(ledger, "b", shadow), BreaksOff()], **settings).train()
    assert [e["status"] for e in stage_of(ledger, "b").shadows()] == ["incomplete"] * 2
    resumed = trainer_of(tmp_path, starts[1], 1, [recording(ledger, "b", shadow)], **settings)
    resumed.train(resume_from_checkpoint=True)
    whole, found = stage_of(ledger, "whole"), stage_of(ledger, "b")
    for replica in range(2):
        assert_close(found.shadow("a", replica), whole.shadow("a", replica))
        assert_close(found.shadow_buffers("a", replica), whole.shadow_buffers("a", replica))
    assert [(e["steps"], e["share"]) for e in found.shadows()] == [(8, 0.125)] * 2
    assert distance(found.shadow("a", 0), found.shadow("a", 1)) > 1e-4
    assert found.problems() == []
    assert not list((ledger / "stages" / "b" / "shadows").glob("*")), "what nothing goes on with is removed"


# ---- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shadow", "stage", "says"),
    [
        (Shadow("z"), "b", r"the stages before this one are \['a'\]"),
        (Shadow("b"), "c", r"the stages before this one are \['a'\]"),
        (Shadow("a"), "c", "'b' was recorded without a complete one"),
    ],
    ids=["unknown", "no ancestor", "not trained along"],
)
def test_what_cannot_be_followed_is_refused_before_the_first_step(
    shadow: Shadow, stage: str, says: str, tmp_path: Path
) -> None:
    model, ledger = Net(), tmp_path / "ledger"
    trainer_of(tmp_path, model, 0, [recording(ledger, "a")]).train()
    after_a = copy.deepcopy(model)
    if stage == "c":
        trainer_of(tmp_path, model, 1, [recording(ledger, "b")]).train()
    start = after_a if shadow.of == "b" else model
    before = named(start)
    trainer = trainer_of(tmp_path, start, 2, [recording(ledger, "refused", shadow)])
    with pytest.raises(ConfigurationError, match=says):
        trainer.train()
    assert same(before, named(start))
    assert trainer.state.global_step == 0
    assert not (ledger / "stages" / "refused").exists(), "the name stays free"


def test_settings_that_cannot_work_are_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="thin=0"):
        Shadow("a", thin=0)
    with pytest.raises(ConfigurationError, match="twice"):
        recording(tmp_path / "ledger", "b", Shadow("a"), Shadow("a", thin=1))
    with pytest.raises(ConfigurationError, match="names no stages"):
        AttributionCallback(tmp_path / "ledger", stage="b", shadow=3)  # type: ignore[arg-type]
    AttributionCallback(tmp_path / "ledger", stage="b", shadow=Shadow("a"))
