"""Shadows beside Lightning: the training without the earlier stage, and a training that does not notice them."""

from __future__ import annotations

import copy
import importlib
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from tests.capture.test_shadow import assert_close, named, stage_of
from tests.integrations.test_lightning import PACKAGES, trainer_of
from tests.integrations.test_lightning_resume import BreaksOff, Loader, ModelCheckpoint
from tests.integrations.test_shadows_huggingface import distance, same
from tests.support import support
from trainer_attrib import Shadow
from trainer_attrib.capture.shadows.replica import Replica
from trainer_attrib.errors import ConfigurationError
from trainer_attrib.integrations.lightning import AttributionCallback
from trainer_attrib.testing.leftovers import hooks_around

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{start}")
    for start in (".*does not have many workers", ".*Starting from v1.9.0", ".*you used `ckpt_path`", "The dirpath has",
                  ".*Checkpoint directory", "Be aware that when using `ckpt_path`")
]  # fmt: skip
SHADOWED = support("Shadows", "Lightning")
WHOLE = Shadow("a", thin=1)
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "accumulation": {"accumulate_grad_batches": 2, "gradient_clip_val": 0.2},
}


def module_of(package: str = PACKAGES[0], kind: str = "AdamW") -> Any:
    """Dropout, running statistics, a schedule, a list and a count that the training step keeps, numbers in the log."""

    class Lit(importlib.import_module(package).LightningModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(4)
            self.body, self.norm, self.drop, self.head = (
                nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.2), nn.Linear(6, 3),
            )  # fmt: skip
            self.seen: list[Tensor] = []
            self.count = torch.zeros(())

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            logits = self.head(self.drop(torch.tanh(self.norm(self.body(batch["x"])))))
            loss = nn.functional.cross_entropy(logits, batch["y"])
            self.seen.append(loss.detach())
            self.count += len(batch["id"])
            self.log("loss", loss, batch_size=len(batch["id"]), on_epoch=True, on_step=True)
            return {"loss": loss, "logits": logits.detach()}

        def configure_optimizers(self) -> Any:
            options = {"lr": 0.05, "momentum": 0.9} if kind == "SGD" else {"lr": 1e-2}
            optimizer = getattr(torch.optim, kind)(self.parameters(), weight_decay=0.1, **options)
            schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    return Lit()


def loader(seed: int, kind: type[DataLoader] = DataLoader) -> Any:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(32, 4, generator=generator)
    y = (x[:, seed % 4] > 0).long() + (x[:, 2] > 1).long()
    return kind([{"id": f"{seed}-{i}", "x": x[i], "y": y[i]} for i in range(32)], batch_size=8)


def fit(
    tmp_path: Path, module: Any, seed: int, *callbacks: Any, package: str = PACKAGES[0], kind: Any = DataLoader,
    resume: Path | None = None, **settings: Any,
) -> Any:  # fmt: skip
    trainer = trainer_of(package, tmp_path, list(callbacks), **settings)
    torch.manual_seed(seed)
    trainer.fit(module, loader(seed, kind), ckpt_path=str(resume) if resume else None, weights_only=False)
    return trainer


def recording(ledger: Path, stage: str, *shadow: Shadow, **options: Any) -> AttributionCallback:
    return AttributionCallback(ledger, stage=stage, shadow=shadow, **{"strict": True, **options})


@SHADOWED
@pytest.mark.parametrize(
    ("name", "kind", "package"),
    [("defaults", "AdamW", PACKAGES[1]), ("accumulation", "AdamW", PACKAGES[0]), ("accumulation", "SGD", PACKAGES[0])],
)
def test_with_the_whole_batch_it_is_the_training_without_the_stage(
    name: str, kind: str, package: str, tmp_path: Path, float64: None
) -> None:
    """Dropout draws the same, running statistics are the shadow's own; the shadow is handed on to the third stage."""
    settings, module, ledger = CONFIGURATIONS[name] | {"package": package}, module_of(package, kind), tmp_path / "l"
    other = copy.deepcopy(module)
    fit(tmp_path, module, 0, recording(ledger, "a"), **settings)
    for seed, stage in ((1, "b"), (2, "c")):
        fit(tmp_path, module, seed, recording(ledger, stage, WHOLE), **settings)
        fit(tmp_path, other, seed, **settings)
        found = stage_of(ledger, stage)
        assert_close(found.shadow("a"), named(other))
        assert_close(found.shadow_buffers("a"), dict(other.named_buffers()))
        assert found.problems() == []
    assert distance(named(module), named(other)) > 1e-2


# ---- training is sacred ---------------------------------------------------------------------------------------------


def outcome(trainer: Any, module: Any) -> dict[str, Any]:
    """Everything that a shadow must not change."""
    states = trainer.optimizers[0].state.values()
    return {
        "metrics": {k: v.clone() for k, v in trainer.callback_metrics.items()},
        "seen": list(module.seen),
        "count": module.count.clone(),
        "state": {k: v.clone() for k, v in module.state_dict().items()},
        "gradients": [p.grad.clone() for p in module.parameters()],
        "optimizer": [{k: v.clone() for k, v in state.items()} for state in states],
        "torch": torch.get_rng_state(),
        "numpy": np.random.get_state()[1].tolist(),  # type: ignore[index]
        "python": random.getstate(),
    }


@SHADOWED
@pytest.mark.parametrize("fault", [False, True], ids=["", "fault"])
@pytest.mark.parametrize("name", [*CONFIGURATIONS, "bf16"])
def test_training_does_not_notice(name: str, fault: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses, weights, buffers, optimizer state, attributes and all random states; also if a shadow breaks down."""
    settings = CONFIGURATIONS.get(name, {"precision": "bf16-mixed"})
    module, ledger = module_of(), tmp_path / "ledger"
    fit(tmp_path, module, 0, recording(ledger, "a"), **settings)
    other = copy.deepcopy(module)
    plain = outcome(fit(tmp_path, other, 1, **settings), other)
    before = hooks_around(module)
    if fault:
        whole = Replica.compare

        def breaks(self: Replica, *args: Any) -> None:
            if self.steps == 2 and self.number == 0:
                raise RuntimeError("no memory")
            whole(self, *args)

        monkeypatch.setattr(Replica, "compare", breaks)
    callback = recording(ledger, "b", Shadow("a", thin=2, replicas=2, every=2, device="cpu"), strict=not fault)
    trainer = fit(tmp_path, module, 1, callback, **settings)
    shadowed = outcome(trainer, module)
    assert len(plain["seen"]) == 16
    assert [key for key in plain if not same(plain[key], shadowed[key])] == []
    assert "training_step" not in module.__dict__
    assert "clip_grad_by_norm" not in trainer.precision_plugin.__dict__
    assert (hooks_around(module) - before).total() == 0
    stage = stage_of(ledger, "b")
    assert stage.meta["status"] == "complete"
    assert [e["status"] for e in stage.shadows()] == ["incomplete" if fault else "complete", "complete"]
    assert stage.shadows()[1]["share"] == 0.125


@support("Shadows", "Lightning, checkpoint and resume")
def test_a_resumed_training_has_the_shadow_of_one_that_ran_through(tmp_path: Path, float64: None) -> None:
    """From the checkpoint after step 3; without dropout, whose random numbers Lightning does not restore."""
    module, ledger, shadow = module_of(), tmp_path / "ledger", Shadow("a", thin=2, replicas=2, every=2)
    module.drop.p = 0.0
    fit(tmp_path, module, 0, recording(ledger, "a"))
    starts = [copy.deepcopy(module) for _ in range(2)]
    fit(tmp_path, module, 1, recording(ledger, "whole", shadow), kind=Loader)
    saver = ModelCheckpoint(tmp_path / "saved", filename="{step}", every_n_train_steps=3, save_top_k=-1, monitor=None)
    settings = {"enable_checkpointing": True, "kind": Loader}
    with pytest.raises(RuntimeError, match="the machine died"):
        fit(tmp_path, starts[0], 1, recording(ledger, "b", shadow), BreaksOff(5), saver, **settings)
    fit(tmp_path, starts[1], 1, recording(ledger, "b", shadow), resume=tmp_path / "saved" / "step=3.ckpt", **settings)
    whole, found = stage_of(ledger, "whole"), stage_of(ledger, "b")
    for replica in range(2):
        assert_close(found.shadow("a", replica), whole.shadow("a", replica))
        assert_close(found.shadow_buffers("a", replica), whole.shadow_buffers("a", replica))
    assert [(e["steps"], e["share"]) for e in found.shadows()] == [(8, 0.125)] * 2
    assert found.problems() == []


# ---- refusals -------------------------------------------------------------------------------------------------------


@support("Shadows", "Lightning, manual optimization, clipping by value, a backward of its own", refused=True)
@pytest.mark.parametrize("what", ["by itself", "by value", "backward of its own", "compiled"])
def test_what_cannot_be_followed_is_refused_before_the_first_step(what: str, tmp_path: Path) -> None:
    module, ledger, settings = module_of(), tmp_path / "ledger", {}
    fit(tmp_path, module, 0, recording(ledger, "a"))
    match what:
        case "by itself":
            module.automatic_optimization = False
        case "by value":
            settings = {"gradient_clip_val": 0.1, "gradient_clip_algorithm": "value"}
        case "backward of its own":
            type(module).backward = lambda self, loss: loss.backward()
        case "compiled":
            module._compiler_ctx = {"compiler": "dynamo"}
    before = named(module)
    with pytest.raises(ConfigurationError, match=f"A shadow cannot follow this training: .*{what}"):
        fit(tmp_path, module, 1, recording(ledger, "b", Shadow("a")), **settings)
    assert same(before, named(module))
    assert not (ledger / "stages" / "b").exists(), "the name stays free"
