"""The Trainer's mixed precision: bfloat16 as a CPU has it, and float16 under a CPU's scaler in accelerate's place."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")

from tests.integrations import test_contract
from tests.support import support
from trainer_attrib.integrations.huggingface import AttributionCallback
from trainer_attrib.ledger.reader import Ledger, StageReader
from trainer_attrib.testing.oracle import example_gradients
from trainer_attrib.testing.reference import Expected
from trainer_attrib.testing.run import Run

HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}
BFLOAT = support("Precision and compilation", "Hugging Face Trainer, bf16=True (on a CPU)")
FLOAT = support("Precision and compilation", "Hugging Face Trainer, float16 with a gradient scaler (a CPU's)")
SCALED = support("Training loops", "Hugging Face Trainer, resume after steps that a gradient scaler skipped")


def trainer_of(run: Run, kind: str = "") -> Any:
    """A Trainer in full precision, with ``bf16=True``, or with what accelerate would give it for ``fp16=True``, if
    there were a GPU: a scaler, and a forward pass under autocast."""
    callbacks = [AttributionCallback(run.ledger, stage="one", sketch=run.sketch, strict=True)] if run.ledger else []
    trainer = test_contract.TestHuggingFace().trainer(run, callbacks, bf16=kind == "bf16")
    if kind == "fp16":
        test_contract.scaled(trainer, torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=1))
        trainer.model.forward = torch.autocast("cpu", dtype=torch.float16)(trainer.model.forward)
    return trainer


def stage_of(run: Run) -> StageReader:
    assert run.ledger is not None
    return Ledger(run.ledger).stage("one")


def rows_of(run: Run) -> dict[tuple[int, str], np.ndarray]:
    found: dict[tuple[int, str], np.ndarray] = {}
    for block in stage_of(run).rows():
        for row, sketch in zip(block.table.to_pylist(), block.sketches, strict=True):
            key = (row["step"], row["example"])
            assert key not in found, "a row is there twice"
            found[key] = sketch * row["norm"]
    return found


def exact_rows(run: Run, dtype: torch.dtype | None) -> torch.Tensor:
    """Rows [N, width] at the initial weights by autograd, under autocast or in full precision."""
    model, expected, rows = replace(run, overflow_at=0).model(), Expected(run, stage_of(run)), []
    for batch in run.loader():

        def losses_of(batch: Any = batch) -> torch.Tensor:
            with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
                return model.example_losses(batch["input_ids"], batch["labels"])

        rows += [expected.row(gradients) for gradients in example_gradients(model, losses_of)]
    return torch.stack(rows)


@pytest.mark.parametrize("kind", [pytest.param("bf16", marks=BFLOAT), pytest.param("fp16", marks=FLOAT)])
def test_rows_are_gradients_of_the_model_in_half_precision(kind: str, tmp_path: Path, close: Callable) -> None:
    """Against autograd of one example at a time under the same autocast, whose own rounding is the tolerance."""
    run = Run(tmp_path, tmp_path / "ledger", epochs=1, accumulate=3)
    trainer_of(run, kind).train()
    eps, (step,) = torch.finfo(HALF[kind]).eps, stage_of(run).steps().to_pylist()
    found = torch.from_numpy(np.stack(list(rows_of(run).values())))
    close(found, exact_rows(run, HALF[kind]).to(found), relative=eps)
    close(found, exact_rows(run, None).to(found), relative=2 * eps)
    assert [example for _, example in rows_of(run)] == [example["id"] for example in run.examples]
    assert step["audit_residual"] < eps
    assert step["audit_scale"] == pytest.approx(1, rel=eps)


@pytest.mark.parametrize("kind", [pytest.param("bf16", marks=BFLOAT), pytest.param("fp16", marks=FLOAT)])
def test_training_is_bit_identical(kind: str, tmp_path: Path) -> None:
    """Also which steps overflow, and what the scale becomes."""
    settings: dict[str, Any] = {"dropout": 0.2, "shuffle": True, "epochs": 3}
    settings["overflow_at"] = 4 if kind == "fp16" else 0
    plain = trainer_of(Run(tmp_path / "plain", **settings), kind)
    recorded = trainer_of(run := Run(tmp_path, tmp_path / "ledger", **settings), kind)
    for trainer in (plain, recorded):
        torch.manual_seed(0)
        trainer.train()
    logs = [[row.get("loss") for row in trainer.state.log_history] for trainer in (plain, recorded)]
    assert logs[0] == logs[1]
    for one, other in zip(plain.model.parameters(), recorded.model.parameters(), strict=True):
        assert torch.equal(one, other)
    scaler = recorded.accelerator.scaler
    assert (scaler is not None) == (kind == "fp16")
    if scaler is not None:
        assert scaler.state_dict() == plain.accelerator.scaler.state_dict()
        assert vars(scaler).keys() == vars(plain.accelerator.scaler).keys()
    stage = stage_of(run)
    assert len(stage.skipped_steps()) == (kind == "fp16")
    assert stage.count("steps") == 9 - (kind == "fp16")


class Dies(test_contract.transformers.TrainerCallback):
    """The machine dies after a step, as the trainer counts them."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


@SCALED
@pytest.mark.parametrize("skipped", [2, 5, 4], ids=["before-the-checkpoint", "after-it", "last-before-it"])
def test_a_run_resumes_after_skipped_steps(skipped: int, tmp_path: Path) -> None:
    """The trainer counts a skipped step, the ledger does not: the checkpoint notes the ledger's own number. A step
    that was skipped between the checkpoint and the break is skipped and listed again: it has no number of its own."""
    settings: dict[str, Any] = {"epochs": 3, "save_every": 4}
    whole = Run(tmp_path / "whole", tmp_path / "whole-ledger", overflow_at=skipped, **settings)
    trainer_of(whole).train()
    broken = Run(tmp_path / "broken", tmp_path / "ledger", overflow_at=skipped, **settings)
    trainer = trainer_of(broken)
    trainer.add_callback(Dies(6))
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    resumed = replace(broken, overflow_at=skipped - 4 if skipped > 4 else 99)  # its model counts from the checkpoint
    trainer_of(resumed).train(resume_from_checkpoint=True)
    expected, found = rows_of(whole), rows_of(resumed)
    assert found.keys() == expected.keys()
    for key, row in expected.items():
        np.testing.assert_allclose(found[key], row, rtol=1e-4, atol=1e-6)
    stage = stage_of(resumed)
    assert stage.meta["status"] == "complete"
    assert stage.meta["resumed"][0]["after_step"] == 4 - (skipped <= 4)
    assert stage.steps()["step"].to_pylist() == list(range(1, 9))
    assert stage.skipped_steps()["step"].to_pylist() == [skipped - 1] * (1 + (skipped > 4))
