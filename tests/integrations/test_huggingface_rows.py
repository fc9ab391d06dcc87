"""What the Trainer callback stores: ids, sources, measured denominators, each example's own gradient, step settings."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import (
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from tests.support import support
from trainer_attrib.integrations.huggingface import AttributionCallback
from trainer_attrib.ledger.reader import Ledger, StageReader
from trainer_attrib.tap.plan import SketchPlan
from trainer_attrib.tap.projections import Projections
from trainer_attrib.testing.oracle import example_gradients, project_gradient
from trainer_attrib.types import SketchConfig

ROWS = 12
SKETCH = SketchConfig(rank=4, dtype="float32", correction="none")


@pytest.fixture
def fit(tmp_path: Path, pad_collator: Callable) -> Callable[..., tuple[Trainer, StageReader]]:
    """Trains on the given rows and returns the trainer and what was recorded."""

    def run(model: Any, rows: Any, **settings: Any) -> tuple[Trainer, StageReader]:
        defaults = {
            "per_device_train_batch_size": 4, "num_train_epochs": 1, "learning_rate": 1e-3, "save_strategy": "no",
            "report_to": [], "disable_tqdm": True, "use_cpu": True, "output_dir": str(tmp_path / "output"),
        }  # fmt: skip
        kind = settings.pop("trainer", Trainer)
        collate, watch = settings.pop("collate", pad_collator()), settings.pop("watch", [])
        sketch = settings.pop("sketch", SKETCH)
        callback = AttributionCallback(tmp_path / "ledger", stage="one", strict=True, sketch=sketch)
        data = datasets.Dataset.from_list(rows) if not settings.pop("plain", False) else rows
        arguments = TrainingArguments(**{**defaults, **settings})
        trainer = kind(model, arguments, train_dataset=data, data_collator=collate, callbacks=[callback, *watch])
        trainer.train()
        return trainer, Ledger(tmp_path / "ledger").stage("one")

    return run


def _table(stage: StageReader) -> list[dict[str, Any]]:
    return [row for block in stage.rows() for row in block.table.to_pylist()]


def _ids_by_epoch(stage: StageReader, steps: int) -> list[list[str]]:
    epochs: dict[int, list[str]] = {}
    for row in _table(stage):
        epochs.setdefault((row["step"] - 1) // steps, []).append(row["example"])
    return list(epochs.values())


# ---- ids ------------------------------------------------------------------------------------------------------------


@support("Data", "map-style sets, shuffled, several epochs")
@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=support("Data", "loader workers"))])
def test_each_named_example_appears_once_per_epoch(
    workers: int, fit: Callable, tiny_gpt2: Callable, token_rows: Callable
) -> None:
    """The id column is dropped by ``remove_unused_columns``, shuffled, and carried through workers; so are sources."""
    rows = [{"id": f"row-{i}", "source": f"s{i % 3}", **row} for i, row in enumerate(token_rows(ROWS))]
    _, stage = fit(tiny_gpt2(), rows, num_train_epochs=3, dataloader_num_workers=workers)
    epochs = _ids_by_epoch(stage, steps=3)
    assert len(epochs) == 3
    assert all(Counter(ids) == Counter(row["id"] for row in rows) for ids in epochs)
    assert epochs[0] != epochs[1]
    assert [row["epoch"] for row in _table(stage)][::4] == pytest.approx([k / 3 for k in range(9)], abs=1e-6)
    known = {row["example"]: row["source"] for row in stage.examples().to_pylist()}
    assert known == {row["id"]: row["source"] for row in rows}


def test_named_rows_are_the_named_examples(fit: Callable, tiny_gpt2: Callable, token_rows: Callable) -> None:
    """The count of target tokens beside each id is that of the row with this id."""
    rows = [{"id": i * 7, **row} for i, row in enumerate(token_rows(ROWS))]
    _, stage = fit(tiny_gpt2(), rows)
    expected = {str(row["id"]): len(row["input_ids"]) - 1 for row in rows}
    assert {row["example"]: row["tokens"] for row in _table(stage)} == expected


@support("Data", "examples without an id column")
def test_unnamed_examples_are_named_by_content(
    fit: Callable, tiny_gpt2: Callable, token_rows: Callable, pad_collator: Callable, tmp_path: Path
) -> None:
    """The same ids in every epoch, and in another run with other batches and the padding on the other side."""
    _, stage = fit(tiny_gpt2(), token_rows(ROWS), plain=True, num_train_epochs=3)
    epochs = [Counter(ids) for ids in _ids_by_epoch(stage, steps=3)]
    assert len(epochs) == 3
    assert len(epochs[0]) == ROWS
    assert epochs[0] == epochs[1] == epochs[2]
    (tmp_path / "ledger").rename(tmp_path / "first")
    again = {"collate": pad_collator("left"), "per_device_train_batch_size": 3, "seed": 7}
    _, other = fit(tiny_gpt2(), token_rows(ROWS), **again)
    assert Counter(row["example"] for row in _table(other)) == epochs[0]


def test_resuming_from_a_checkpoint_keeps_the_names(fit: Callable, tiny_gpt2: Callable, token_rows: Callable) -> None:
    """The trainer skips batches with another loader, made from the one that the ids ride in."""
    rows = [{"id": f"row-{i}", **row} for i, row in enumerate(token_rows(ROWS))]

    trainer, first = fit(tiny_gpt2(), rows, save_strategy="steps", save_steps=1)
    trainer.train(resume_from_checkpoint=f"{trainer.args.output_dir}/checkpoint-1")
    resumed = Ledger(first._storage.url).stage("one.2")
    names = [row["example"] for row in _table(first)]
    assert Counter(names) == Counter(row["id"] for row in rows)
    assert [row["example"] for row in _table(resumed)] == names[4:]


# ---- denominators ---------------------------------------------------------------------------------------------------


class Dividing(Trainer):
    """Notes by what each micro-batch's summed cross entropy was divided, from loss and logits alone."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        labels, length = inputs["labels"], self.__dict__.setdefault("divisors", [])
        loss, outputs = super().compute_loss(model, dict(inputs), return_outputs=True, **kwargs)
        logits = outputs.logits.detach()
        if labels.dim() == 2:
            logits, labels = logits[:, :-1].transpose(1, 2), labels[:, 1:]
        smoothing = self.args.label_smoothing_factor
        total = F.cross_entropy(logits, labels, reduction="sum", label_smoothing=smoothing)
        scaled = self.model_accepts_loss_kwargs and kwargs.get("num_items_in_batch") is not None
        accumulated = 1 if scaled else self.current_gradient_accumulation_steps
        length.append(float(total / loss.detach()) * accumulated)
        return (loss, outputs) if return_outputs else loss


def _llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 29, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2, pad_token_id=0))


def _classifier() -> GPT2ForSequenceClassification:
    torch.manual_seed(0)
    sizes = {"vocab_size": 29, "n_positions": 32, "n_embd": 24, "n_layer": 2, "n_head": 2, "num_labels": 3}
    drops = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    return GPT2ForSequenceClassification(GPT2Config(**sizes, **drops, pad_token_id=0))


class ClassCollator:
    """Labels a row by its length."""

    def __init__(self, pad: Callable[..., Any]) -> None:
        self.pad = pad

    def __call__(self, items: list[Any]) -> dict[str, torch.Tensor]:
        batch = self.pad(items)
        return {**batch, "labels": batch["attention_mask"].sum(1) % 3}


@support("Training loops", "Hugging Face Trainer, gradient accumulation and clipping")
@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("kind", ["gpt2", "llama", "classifier", "smoothed"])
def test_denominators_are_what_the_loss_was_divided_by(
    kind: str, accumulate: int, fit: Callable, tiny_gpt2: Callable, token_rows: Callable, pad_collator: Callable
) -> None:
    model = {"llama": _llama, "classifier": _classifier}.get(kind, tiny_gpt2)()
    settings: dict[str, Any] = {"trainer": Dividing, "gradient_accumulation_steps": accumulate}
    if kind == "classifier":
        settings["collate"] = ClassCollator(pad_collator())
    if kind == "smoothed":
        settings["label_smoothing_factor"] = 0.1
    trainer, stage = fit(model, token_rows(ROWS), **settings)
    table = _table(stage)
    assert len(table) == ROWS
    assert {row["denominator_source"] for row in table} == {"num_items_in_batch" if kind == "smoothed" else "measured"}
    expected = [divisor for divisor in trainer.divisors for _ in range(4)]
    assert [row["denominator"] for row in table] == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("kind", ["gpt2", "llama", "classifier"])
def test_rows_are_the_gradients_of_the_examples_own_summed_losses(
    kind: str, fit: Callable, tiny_gpt2: Callable, token_rows: Callable, pad_collator: Callable, close: Callable
) -> None:
    """Accumulation, clipping and the trainer's normalisation are gone: the row is that of the example on its own."""
    model = {"llama": _llama, "classifier": _classifier, "gpt2": tiny_gpt2}[kind]()
    collate = ClassCollator(pad_collator()) if kind == "classifier" else pad_collator()
    rows = [{"id": str(i), **row} for i, row in enumerate(token_rows(ROWS))]
    initial = {name: p.detach().clone() for name, p in model.named_parameters()}
    _, stage = fit(model, rows, gradient_accumulation_steps=3, max_grad_norm=0.1, collate=collate)
    model.load_state_dict(initial, strict=False)
    model.train()
    plan = SketchPlan.from_dict(stage.meta["plan"])
    projections = Projections(plan, model)
    keep = torch.ones(plan.width, dtype=torch.bool)
    for weight in plan.weights:
        keep[weight.span] = weight.name not in stage.meta["coverage"]["partial"]
    (block,) = stage.rows()
    for row, sketch in zip(block.table.to_pylist(), block.sketches, strict=True):
        batch = collate([rows[int(row["example"])]])

        def losses_of(batch: Any = batch) -> torch.Tensor:
            logits, labels = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits, batch["labels"]
            if labels.dim() == 2:
                logits, labels = logits[:, :-1].transpose(1, 2), labels[:, 1:]
            return F.cross_entropy(logits, labels, reduction="sum")[None]

        exact = project_gradient(plan, projections, example_gradients(model, losses_of)[0])[keep]
        close(torch.from_numpy(np.array(sketch))[keep] * row["norm"], exact, relative=1e-4)
        assert row["norm"] == pytest.approx(float(exact.norm()), rel=1e-4)
    assert not block.sketches[:, ~keep.numpy()].any()


# ---- steps ----------------------------------------------------------------------------------------------------------


class WatchesOptimizer(TrainerCallback):
    """Notes what the optimizer is about to use."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Any]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        groups = kwargs["optimizer"].param_groups
        norm = torch.nn.utils.get_total_norm([p.grad for p in kwargs["model"].parameters() if p.grad is not None])
        self.seen.append(
            {
                "learning_rate": [float(g["lr"]) for g in groups],
                "weight_decay": [g["weight_decay"] for g in groups],
                "gradient_norm": float(norm),
            }
        )


@support("Training loops", "Hugging Face Trainer")
def test_steps_hold_what_the_optimizer_used(fit: Callable, tiny_gpt2: Callable, token_rows: Callable) -> None:
    """A linear schedule to 0: the first step used the full rate, the last one a third of it, none used 0."""
    watch = WatchesOptimizer()
    trainer, stage = fit(
        tiny_gpt2(),
        token_rows(ROWS),
        watch=[watch],
        max_grad_norm=0.5,
        weight_decay=0.1,
        adam_beta2=0.95,
        logging_steps=1,
    )
    steps = stage.steps().to_pylist()
    assert [row["learning_rate"] for row in steps] == [seen["learning_rate"] for seen in watch.seen]
    assert [row["learning_rate"][0] for row in steps] == pytest.approx([1e-3, 2e-3 / 3, 1e-3 / 3])
    assert [row["weight_decay"] for row in steps] == [seen["weight_decay"] for seen in watch.seen]
    assert steps[0]["weight_decay"] == [0.1, 0.0]
    assert [row["gradient_norm"] for row in steps] == pytest.approx([s["gradient_norm"] for s in watch.seen], rel=1e-6)
    assert all(row["clip_threshold"] == 0.5 for row in steps)
    assert all((row["beta1"], row["beta2"]) == ([0.9, 0.9], [0.95, 0.95]) for row in steps)
    logged = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert [row["loss"] for row in steps] == pytest.approx(logged, rel=1e-3)


def test_versions_follow_the_refreshes(fit: Callable, tiny_gpt2: Callable, token_rows: Callable) -> None:
    """Raw to step 4, then version 1 to step 12, then version 2."""
    _, stage = fit(tiny_gpt2(), token_rows(ROWS), num_train_epochs=5, sketch=SketchConfig(rank=4))
    assert stage.steps()["version"].to_pylist() == [0] * 4 + [1] * 8 + [2] * 3
    assert [row["version"] for row in _table(stage)][::4] == [0] * 4 + [1] * 8 + [2] * 3
    assert [entry["after_step"] for entry in stage.meta["versions"]] == [4, 12]


def test_settings_and_text_are_kept(fit: Callable, tiny_gpt2: Callable, token_rows: Callable) -> None:
    _, stage = fit(tiny_gpt2(), token_rows(ROWS), optim="sgd")
    assert stage.meta["trainer"] == "Trainer"
    assert stage.meta["settings"]["per_device_train_batch_size"] == 4
    assert "SGD" in stage.meta["optimizers"][0]["class"]
    assert stage.meta["versions_of"].keys() >= {"torch", "transformers", "trainer-attrib"}
