"""The Trainer's gradient checkpointing of both kinds, and operations in place after a layer: exact rows or a reason."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

transformers = pytest.importorskip("transformers")

import datasets  # noqa: E402

from tests.support import support  # noqa: E402
from trainer_attrib.integrations.huggingface import AttributionCallback  # noqa: E402
from trainer_attrib.ledger.reader import Ledger, StageReader  # noqa: E402
from trainer_attrib.tap.plan import SketchPlan  # noqa: E402
from trainer_attrib.tap.projections import Projections  # noqa: E402
from trainer_attrib.testing.oracle import example_gradients, project_gradient  # noqa: E402
from trainer_attrib.testing.run import Classifier, collate, make_examples  # noqa: E402
from trainer_attrib.types import SketchConfig  # noqa: E402

SKETCH = SketchConfig(rank=4, dtype="float32", correction="none")
AREA = "Precision and compilation"
KINDS = {
    "non-reentrant": support(AREA, "gradient checkpointing, non-reentrant, transformers.Trainer"),
    "reentrant": support(AREA, "gradient checkpointing, reentrant, transformers.Trainer"),
}
SEVERAL = "gradient checkpointing, {}, several forward passes before one backward pass, transformers.Trainer"


class Twice(transformers.Trainer):
    """The batch's halves in two forward passes, and one backward pass through both."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        halves = [{key: value[part] for key, value in inputs.items()} for part in (slice(0, 2), slice(2, 4))]
        losses = [F.cross_entropy(*flat(model, half), reduction="sum") for half in halves]
        count = (inputs["labels"][:, 1:] != -100).sum()
        return torch.stack(losses).sum() / count


def flat(model: Any, batch: Any) -> tuple[Tensor, Tensor]:
    """Logits [T, V] and labels [T] of the next tokens."""
    logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten()


class Fit:
    """One step over micro-batches of four examples, recorded; the model is then back where it began."""

    def __init__(self, model: Any, rows: Any, pad: Any, folder: Path, kind: str, trainer: Any) -> None:
        self.model, initial = model, {name: p.detach().clone() for name, p in model.named_parameters()}
        self.rows, self.pad = [{**row, "id": str(i)} for i, row in enumerate(rows)], pad
        arguments = transformers.TrainingArguments(
            str(folder / "out"), per_device_train_batch_size=4, gradient_accumulation_steps=len(rows) // 4,
            report_to=[], disable_tqdm=True, use_cpu=True, save_strategy="no", logging_strategy="no", max_steps=1,
            train_sampling_strategy="sequential", gradient_checkpointing=bool(kind),
            gradient_checkpointing_kwargs={"use_reentrant": kind == "reentrant"} if kind else None,
        )  # fmt: skip
        tokens = sum(len(row["input_ids"]) - 1 for row in self.rows)
        self.divisor = tokens if trainer is Twice else None
        callback = AttributionCallback(folder / "ledger", stage="one", sketch=SKETCH, strict=True)
        data = datasets.Dataset.from_list(self.rows)
        trainer(model, arguments, train_dataset=data, data_collator=pad, callbacks=[callback]).train()
        self.stage: StageReader = Ledger(folder / "ledger").stage("one")
        model.load_state_dict(initial, strict=False)
        model.gradient_checkpointing_disable()

    def compare(self, close: Callable) -> None:
        """Every row with the gradient of the example alone, without checkpoints, of the weights captured in full. What
        :class:`Twice` divides its loss by the callback can only assume."""
        plan = SketchPlan.from_dict(self.stage.meta["plan"])
        kept = torch.ones(plan.width, dtype=torch.bool)
        for weight in plan.weights:
            kept[weight.span] = weight.name not in self.stage.meta["coverage"]["partial"]
        table, sketches = rows_of(self.stage)
        for example, row, sketch in zip(self.rows, table, sketches, strict=True):
            batch = self.pad([example])
            (own,) = example_gradients(
                self.model, lambda batch=batch: F.cross_entropy(*flat(self.model, batch), reduction="sum")[None]
            )
            exact = project_gradient(plan, Projections(plan, self.model), own)
            norm = row["norm"] if self.divisor is None else row["norm"] / row["denominator"] * self.divisor
            close(sketch[kept] * norm, exact[kept], relative=1e-5)


def rows_of(stage: StageReader) -> tuple[list[dict[str, Any]], Tensor]:
    blocks = list(stage.rows())
    table = [row for block in blocks for row in block.table.to_pylist()]
    return table, torch.from_numpy(np.concatenate([np.array(block.sketches) for block in blocks]))


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=mark) for kind, mark in KINDS.items()])
def test_rows_are_exact_under_gradient_checkpointing(
    kind: str, tiny_gpt2: Callable, token_rows: Callable, pad_collator: Callable, tmp_path: Path, close: Callable
) -> None:
    fit = Fit(tiny_gpt2().train(), token_rows(8), pad_collator(), tmp_path, kind, transformers.Trainer)
    fit.compare(close)
    assert set(fit.stage.meta["coverage"]["partial"]) == {"transformer.wpe.weight"}  # positions are nobody's own
    assert max(fit.stage.steps()["audit_residual"].to_pylist()) < 1e-5


@support(AREA, SEVERAL.format("non-reentrant"))
def test_several_forward_passes_before_one_backward_pass(
    tiny_gpt2: Callable, token_rows: Callable, pad_collator: Callable, tmp_path: Path, close: Callable
) -> None:
    fit = Fit(tiny_gpt2().train(), token_rows(4), pad_collator(), tmp_path, "non-reentrant", Twice)
    fit.compare(close)
    assert set(fit.stage.meta["coverage"]["partial"]) == {"transformer.wpe.weight"}  # positions are nobody's own


@pytest.mark.parametrize("reason", [pytest.param(
    "reentrant checkpointing, with several forward passes before one backward pass",
    marks=support(AREA, SEVERAL.format("reentrant"), refused=True),
)])  # fmt: skip
def test_reentrant_checkpoints_of_several_forward_passes_are_left_out(
    reason: str, tiny_gpt2: Callable, token_rows: Callable, pad_collator: Callable, tmp_path: Path, close: Callable
) -> None:
    """A layer inside a checkpoint runs again in the backward pass, where nothing tells of which forward pass it is;
    layers outside keep exact rows."""
    fit = Fit(tiny_gpt2().train(), token_rows(4), pad_collator(), tmp_path, "reentrant", Twice)
    coverage = fit.stage.meta["coverage"]
    assert reason in str(coverage)
    assert "transformer.h.0.mlp.c_fc.weight" in coverage["partial"]
    fit.compare(close)


class InPlace(Classifier):
    """Adds, multiplies and clips in place what layers returned, also views of it."""

    def logits(self, input_ids: Tensor) -> Tensor:
        embedded = self.embedding(input_ids)
        embedded.mul_(0.5).add_(0.1)
        hidden = self.body(embedded)
        hidden[:, 0] *= 2.0
        F.relu_(hidden)
        logits = self.head(self.dropout(hidden.mean(1)))
        return logits.add_(0.25)


@support("Layers", "operations in place after a layer, transformers.Trainer")
def test_operations_in_place_after_a_layer(tmp_path: Path, close: Callable) -> None:
    torch.manual_seed(0)
    model, examples = InPlace().train(), make_examples(8)
    initial = {name: p.detach().clone() for name, p in model.named_parameters()}
    arguments = transformers.TrainingArguments(
        str(tmp_path / "out"), per_device_train_batch_size=4, gradient_accumulation_steps=2, num_train_epochs=1,
        report_to=[], disable_tqdm=True, use_cpu=True, save_strategy="no", logging_strategy="no",
        train_sampling_strategy="sequential",
    )  # fmt: skip
    callback = AttributionCallback(tmp_path / "ledger", stage="one", sketch=SKETCH, strict=True)
    transformers.Trainer(
        model, arguments, train_dataset=datasets.Dataset.from_list(examples), data_collator=collate,
        callbacks=[callback],
    ).train()  # fmt: skip
    stage = Ledger(tmp_path / "ledger").stage("one")
    model.load_state_dict(initial)
    plan, batch = SketchPlan.from_dict(stage.meta["plan"]), collate(examples)
    own = example_gradients(model, lambda: model.example_losses(batch["input_ids"], batch["labels"]))
    exact = torch.stack([project_gradient(plan, Projections(plan, model), gradients) for gradients in own])
    table, sketches = rows_of(stage)
    assert [row["example"] for row in table] == [example["id"] for example in examples]
    close(sketches * torch.tensor([row["norm"] for row in table])[:, None], exact, relative=1e-5)
    assert max(stage.steps()["audit_residual"].to_pylist()) < 1e-5
    assert len(plan.weights) == 3
