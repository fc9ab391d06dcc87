"""A small GPT-2 with a tokenizer of its own, trained from scratch by transformers' Trainer and recorded."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset, disable_progress_bars
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    DataCollatorForLanguageModeling,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    PrinterCallback,
    Trainer,
    TrainingArguments,
)

from trainer_attrib import SketchConfig
from trainer_attrib.integrations.huggingface import AttributionCallback

SPECIAL = {"unk_token": "<unk>", "pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>"}
WORDS = r" ?[\p{L}\p{M}\p{N}'\-]+| ?[^\s\p{L}\p{M}\p{N}]|\s"
STAGE = "pretrain"
BLOCKS = "transformer.h.*"  # as in the paper, which leaves out embeddings and final norm


@dataclass(frozen=True)
class Size:
    """Of a model and its training."""

    width: int
    layers: int
    context: int
    epochs: float
    batch: int
    rate: float
    rank: int


def quiet() -> None:
    """Only the table is printed."""
    transformers.logging.set_verbosity_error()
    disable_progress_bars()
    logging.getLogger("trainer_attrib").setLevel(logging.WARNING)


def tokenizer_of(texts: Sequence[str], context: int, vocabulary: int | None = None) -> PreTrainedTokenizerFast:
    """One token per word, the most frequent first; all words, or so many."""
    split = pre_tokenizers.Split(Regex(WORDS), behavior="isolated")
    counts = Counter(token for text in texts for token, _ in split.pre_tokenize_str(text))
    words = sorted(counts, key=lambda token: (-counts[token], token))[:vocabulary]
    numbers = {token: number for number, token in enumerate([*SPECIAL.values(), *words])}
    tokenizer = Tokenizer(models.WordLevel(numbers, unk_token=SPECIAL["unk_token"]))
    tokenizer.pre_tokenizer = split
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=context, clean_up_tokenization_spaces=False, **SPECIAL
    )


def initial_model(tokenizer: PreTrainedTokenizerFast, size: Size, seed: int) -> GPT2LMHeadModel:
    """An untrained model without dropout."""
    config = GPT2Config(
        vocab_size=len(tokenizer), n_positions=size.context, n_embd=size.width, n_layer=size.layers, n_head=4,
        initializer_range=0.05, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        bos_token_id=2, eos_token_id=3, pad_token_id=1,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = GPT2LMHeadModel(config)
    model.loss_type = "ForCausalLM"  # which its class name does not tell transformers
    return model


def train(
    model: GPT2LMHeadModel,
    tokenizer: PreTrainedTokenizerFast,
    rows: list[dict[str, str]],
    folder: Path,
    size: Size,
    seed: int,
    correction: str,
) -> Path:
    """Train the model on rows with ``id`` and ``text``; returns the ledger, with rows corrected as asked."""
    sketch = SketchConfig(rank=size.rank, modules=BLOCKS, correction=correction)
    ledger = folder / f"ledger-{correction}"
    arguments: dict[str, Any] = {
        "num_train_epochs": size.epochs, "per_device_train_batch_size": size.batch, "learning_rate": size.rate,
        "seed": seed, "data_seed": seed, "lr_scheduler_type": "linear", "warmup_steps": 20, "use_cpu": True,
        "dataloader_pin_memory": False, "report_to": "none", "save_strategy": "no", "logging_strategy": "no",
        "disable_tqdm": True,
    }  # fmt: skip
    trainer = Trainer(
        model=model,
        args=TrainingArguments(str(folder / "trainer"), **arguments),
        train_dataset=_tokenized(rows, tokenizer, size.context),
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        processing_class=tokenizer,
        callbacks=[AttributionCallback(ledger, stage=STAGE, snapshots=0, sketch=sketch)],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return ledger


def _tokenized(rows: list[dict[str, str]], tokenizer: PreTrainedTokenizerFast, context: int) -> Dataset:
    texts = [row["text"] for row in rows]
    encoded = tokenizer(texts, return_token_type_ids=False, truncation=True, max_length=context)
    return Dataset.from_list([{**row, "input_ids": ids} for row, ids in zip(rows, encoded["input_ids"], strict=True)])
