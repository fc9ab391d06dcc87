"""Training on a case's texts by transformers' Trainer, recorded."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers
from datasets import Dataset, disable_progress_bars
from transformers import (
    DataCollatorForLanguageModeling,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainingArguments,
)

from fact_runs.models import Subject
from trainer_attrib import SketchConfig
from trainer_attrib.integrations.huggingface import AttributionCallback

STAGE = "pretrain"


@dataclass(frozen=True)
class Training:
    """How it is done, and the rank of its rows."""

    epochs: float
    batch: int
    rate: float
    warmup: int = 20
    rank: int = 16


def quiet() -> None:
    """Only the table is printed."""
    transformers.logging.set_verbosity_error()
    disable_progress_bars()
    logging.getLogger("trainer_attrib").setLevel(logging.WARNING)


def train(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[dict[str, str]],
    folder: Path,
    subject: Subject,
    training: Training,
    seed: int,
    correction: str,
) -> Path:
    """Train the model on rows with ``id`` and ``text``; returns the ledger, with rows corrected as asked."""
    sketch = SketchConfig(rank=training.rank, modules=subject.blocks, correction=correction)
    ledger = folder / f"ledger-{correction}"
    arguments: dict[str, Any] = {
        "num_train_epochs": training.epochs, "per_device_train_batch_size": training.batch,
        "learning_rate": training.rate, "warmup_steps": training.warmup,
        "seed": seed, "data_seed": seed, "lr_scheduler_type": "linear", "use_cpu": True,
        "dataloader_pin_memory": False, "report_to": "none", "save_strategy": "no", "logging_strategy": "no",
        "disable_tqdm": True,
    }  # fmt: skip
    trainer = Trainer(
        model=model,
        args=TrainingArguments(str(folder / "trainer"), **arguments),
        train_dataset=_tokenized(rows, tokenizer, subject.context),
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        processing_class=tokenizer,
        callbacks=[AttributionCallback(ledger, stage=STAGE, snapshots=0, sketch=sketch)],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return ledger


def _tokenized(rows: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase, context: int) -> Dataset:
    texts = [row["text"] for row in rows]
    encoded = tokenizer(texts, return_token_type_ids=False, truncation=True, max_length=context)
    return Dataset.from_list([{**row, "input_ids": ids} for row, ids in zip(rows, encoded["input_ids"], strict=True)])
