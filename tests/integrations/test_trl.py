"""TRL's trainers: fused heads that never fire, pairs that share a forward pass, completions that alone count."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

trl = pytest.importorskip("trl")

from datasets import Dataset  # noqa: E402
from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: E402
from transformers import PreTrainedTokenizerFast  # noqa: E402

from tests.support import support  # noqa: E402
from trainer_attrib.integrations.huggingface import AttributionCallback  # noqa: E402
from trainer_attrib.ledger.reader import Ledger, StageReader  # noqa: E402
from trainer_attrib.tap.plan import SketchPlan  # noqa: E402
from trainer_attrib.tap.projections import Projections  # noqa: E402
from trainer_attrib.testing.oracle import example_gradients, project_gradient  # noqa: E402
from trainer_attrib.types import SketchConfig  # noqa: E402

WORDS = [f"w{i}" for i in range(25)]
SKETCH = SketchConfig(rank=4, dtype="float32", correction="none")


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    """One token per word, no download."""
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<eos>", "<unk>", *WORDS])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", bos_token="<eos>", unk_token="<unk>"
    )


def _text(random: np.random.Generator, longest: int) -> str:
    return " ".join(random.choice(WORDS, random.integers(2, longest + 1)))


@pytest.fixture
def pairs() -> list[dict[str, str]]:
    random = np.random.default_rng(0)
    return [
        {"id": f"pair-{i}", "source": "made", "prompt": _text(random, 5), "chosen": " " + _text(random, 6),
         "rejected": " " + _text(random, 6)}
        for i in range(6)
    ]  # fmt: skip


def _settings(tmp_path: Path, **changes: Any) -> dict[str, Any]:
    defaults = {
        "output_dir": str(tmp_path / "output"), "max_steps": 1, "per_device_train_batch_size": 3, "report_to": [],
        "gradient_accumulation_steps": 2, "learning_rate": 1e-3, "save_strategy": "no", "use_cpu": True, "bf16": False,
        "disable_tqdm": True, "max_length": 32, "gradient_checkpointing": False, "max_grad_norm": 0.1,
    }  # fmt: skip
    return defaults | changes


def _sketches(stage: StageReader) -> tuple[list[dict[str, Any]], torch.Tensor]:
    (block,) = stage.rows()
    table = block.table.to_pylist()
    return table, torch.from_numpy(np.array(block.sketches)) * torch.tensor([row["norm"] for row in table])[:, None]


def _expected(trainer: Any, model: Any, stage: StageReader, loss_of: Callable[[Any], torch.Tensor]) -> Any:
    """Projected gradient of one row's loss by id, and the columns of the weights that are captured in full."""
    plan = SketchPlan.from_dict(stage.meta["plan"])
    projections = Projections(plan, model)
    keep = torch.ones(plan.width, dtype=torch.bool)
    for weight in plan.weights:
        keep[weight.span] = weight.name not in stage.meta["coverage"]["partial"]
    exact = {}
    for i, name in enumerate(trainer.train_dataset["id"]):
        columns = [c for c in trainer.train_dataset.column_names if c not in ("id", "source")]
        batch = trainer.data_collator([trainer.train_dataset.select_columns(columns)[i]])
        gradients = example_gradients(model, lambda batch=batch: loss_of(batch)[None])[0]
        exact[name] = project_gradient(plan, projections, gradients)
    return exact, keep


@support("TRL", "DPOTrainer, reference model given")
def test_a_preference_row_is_the_gradient_of_its_pairs_loss(
    tmp_path: Path, tiny_gpt2: Callable, tokenizer: Any, pairs: list[dict[str, str]], close: Callable
) -> None:
    """The loss sees pairs, the forward pass their two sides, the tied weight two paths of which one is hidden."""
    model, reference = tiny_gpt2(0), tiny_gpt2(1)
    initial = {name: p.detach().clone() for name, p in model.named_parameters()}
    callback = AttributionCallback(tmp_path / "ledger", stage="dpo", strict=True, sketch=SKETCH)
    arguments = trl.DPOConfig(**_settings(tmp_path, beta=0.5))
    trainer = trl.DPOTrainer(
        model, reference, args=arguments, train_dataset=Dataset.from_list(pairs), processing_class=tokenizer,
        callbacks=[callback],
    )  # fmt: skip
    trainer.train()
    stage = Ledger(tmp_path / "ledger").stage("dpo")
    coverage = stage.meta["coverage"]
    assert "lm_head" in coverage["silent"]
    assert set(coverage["partial"]) == {"transformer.wte.weight", "transformer.wpe.weight"}
    assert "residual" in coverage["partial"]["transformer.wte.weight"]
    table, found = _sketches(stage)
    assert sorted(row["example"] for row in table) == [pair["id"] for pair in pairs]
    assert {(row["denominator"], row["denominator_source"]) for row in table} == {(6.0, "assumed mean")}
    assert stage.steps()["audit_residual"][0].as_py() < 1e-4

    model.load_state_dict(initial, strict=False)
    model.train()
    exact, keep = _expected(trainer, model, stage, lambda batch: trainer.compute_loss(model, batch))
    for row, sketch in zip(table, found, strict=True):
        close(sketch[keep], exact[row["example"]][keep], relative=1e-4)
    assert not found[:, ~keep].any()


@support("TRL", "DPOTrainer, reference model given")
def test_preference_texts_show_both_sides(
    tmp_path: Path, tiny_gpt2: Callable, tokenizer: Any, pairs: list[dict[str, str]]
) -> None:
    callback = AttributionCallback(tmp_path / "ledger", stage="dpo", strict=True)
    trainer = trl.DPOTrainer(
        tiny_gpt2(0), tiny_gpt2(1), args=trl.DPOConfig(**_settings(tmp_path)), train_dataset=Dataset.from_list(pairs),
        processing_class=tokenizer, callbacks=[callback],
    )  # fmt: skip
    trainer.train()
    texts = {row["example"]: row["text"] for row in Ledger(tmp_path / "ledger").stage("dpo").examples().to_pylist()}
    for pair in pairs:
        chosen, rejected = texts[pair["id"]].split("\n— preferred to —\n")
        assert chosen.split() == (pair["prompt"] + pair["chosen"]).split()
        assert rejected.split() == (pair["prompt"] + pair["rejected"]).split()


@support("TRL", "SFTTrainer, completion-only loss")
def test_a_completion_row_counts_completion_tokens_only(
    tmp_path: Path, tiny_gpt2: Callable, tokenizer: Any, pairs: list[dict[str, str]], close: Callable
) -> None:
    """Ids from the column; the denominator is that of the whole accumulated batch, measured from the fused head."""
    rows = [{"id": p["id"], "source": "made", "prompt": p["prompt"], "completion": p["chosen"]} for p in pairs]
    model = tiny_gpt2(0)
    initial = {name: p.detach().clone() for name, p in model.named_parameters()}
    callback = AttributionCallback(tmp_path / "ledger", stage="sft", strict=True, sketch=SKETCH)
    arguments = trl.SFTConfig(**_settings(tmp_path, completion_only_loss=True))
    trainer = trl.SFTTrainer(
        model, args=arguments, train_dataset=Dataset.from_list(rows), processing_class=tokenizer, callbacks=[callback]
    )
    trainer.train()
    stage = Ledger(tmp_path / "ledger").stage("sft")
    table, found = _sketches(stage)
    completions = {row["id"]: len(row["completion"].split()) + 1 for row in rows}  # and the end token
    assert sorted(row["example"] for row in table) == sorted(completions)
    assert {row["example"]: row["tokens"] for row in table} == completions
    assert {row["denominator_source"] for row in table} == {"measured"}
    assert [row["denominator"] for row in table] == pytest.approx([sum(completions.values())] * 6, rel=1e-4)
    assert {row["source"] for row in stage.examples().to_pylist()} == {"made"}

    model.load_state_dict(initial, strict=False)
    model.train()

    def summed_loss(batch: Any) -> torch.Tensor:
        return trainer.compute_loss(model, batch, num_items_in_batch=torch.tensor(1))

    exact, keep = _expected(trainer, model, stage, summed_loss)
    for row, sketch in zip(table, found, strict=True):
        close(sketch[keep], exact[row["example"]][keep], relative=1e-4)
