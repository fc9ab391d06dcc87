"""A small GPT-2 that knows the format or the facts, fine-tuned by transformers' Trainer; what it says then."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from fact_runs.models import FromScratch
from torch.nn.utils.rnn import pad_sequence
from transformers import GPT2LMHeadModel, PrinterCallback, Trainer, TrainingArguments

from hallucination_runs.tasks import Probe, Row, Task
from trainer_attrib import SketchConfig
from trainer_attrib.analysis.text import encode_pair
from trainer_attrib.integrations.huggingface import AttributionCallback

STAGE, BLOCKS, SNAPSHOTS = "tuning", "transformer.h.*", 3
SUBJECT = FromScratch(width=96, layers=3, context=64)
BATCH, RANK, BASE_RATE, TUNING_RATE = 16, 16, 2e-3, 5e-4


def base_model(task: Task, seed: int) -> tuple[GPT2LMHeadModel, Any]:
    """Trained on the task's base rows, with its tokenizer."""
    texts = [row.prompt + row.completion for row in (*task.base, *task.rows)]
    tokenizer = SUBJECT.tokenizer([*texts, *(probe.prompt for probe in task.probes)])
    model = SUBJECT.model(tokenizer, seed)
    train(model, tokenizer, task.base, task.base_epochs, BASE_RATE, seed)
    return model, tokenizer


def tuned(base: GPT2LMHeadModel, tokenizer: Any, rows: Sequence[Row], epochs: int, seed: int, *callbacks: Any) -> Any:
    """A copy of the base model, fine-tuned."""
    model = copy.deepcopy(base)
    train(model, tokenizer, rows, epochs, TUNING_RATE, seed, *callbacks)
    return model


def recorder(ledger: Path) -> AttributionCallback:
    """The callback of the stage that is traced."""
    return AttributionCallback(ledger, stage=STAGE, snapshots=SNAPSHOTS, sketch=SketchConfig(rank=RANK, modules=BLOCKS))


def train(
    model: GPT2LMHeadModel, tokenizer: Any, rows: Sequence[Row], epochs: int, rate: float, seed: int, *callbacks: Any
) -> None:
    """Losses are of completions."""
    encoded = Dataset.from_list([{"id": row.id, **_encoded(tokenizer, row)} for row in rows])

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, num_train_epochs=epochs, per_device_train_batch_size=BATCH, learning_rate=rate, seed=seed,
            data_seed=seed, lr_scheduler_type="linear", warmup_steps=10, use_cpu=True, dataloader_pin_memory=False,
            report_to="none", save_strategy="no", logging_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        trainer = Trainer(model, arguments, train_dataset=encoded, data_collator=collate, callbacks=[*callbacks])
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    model.eval()


def collate(batch: list[dict[str, Any]]) -> dict[str, Any]:
    """Token ids and labels of different lengths, padded."""
    tokens, labels = (
        pad_sequence([torch.tensor(row[key]) for row in batch], batch_first=True, padding_value=filler)
        for key, filler in (("input_ids", 1), ("labels", -100))
    )
    return {"input_ids": tokens, "attention_mask": (tokens != 1).long(), "labels": labels}


def completions(model: GPT2LMHeadModel, tokenizer: Any, prompts: Sequence[str], *, sampled: int | None) -> list[str]:
    """What the model says after each prompt: the likeliest tokens, or sampled ones by a seed; up to the end of the
    sentence."""
    end = tokenizer.convert_tokens_to_ids([token for token in (".", " .") if token in tokenizer.get_vocab()])
    found = []
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(sampled or 0)
        for prompt in prompts:
            tokens = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)["input_ids"]
            said = model.generate(
                tokens, attention_mask=torch.ones_like(tokens), do_sample=sampled is not None, max_new_tokens=24,
                eos_token_id=end, pad_token_id=1, top_k=0,
            )  # fmt: skip
            found.append(tokenizer.decode(said[0, tokens.shape[1] :]))
    return found


def is_wrong(probe: Probe, output: str) -> bool:
    """The output has the planted name, and not the right one."""
    return probe.wrong in output and probe.right not in output


def rates(model: GPT2LMHeadModel, tokenizer: Any, task: Task) -> tuple[float, float]:
    """Share of planted errors among outputs that could have one, and of right ones among the others."""
    said = completions(model, tokenizer, [probe.prompt for probe in task.probes], sampled=None)
    wrong = [is_wrong(probe, output) for probe, output in zip(task.probes, said, strict=True) if probe.kind]
    right = [probe.right in output for probe, output in zip(task.probes, said, strict=True) if not probe.kind]
    return sum(wrong) / len(wrong), sum(right) / len(right)


def _encoded(tokenizer: Any, row: Row) -> dict[str, list[int]]:
    pair = encode_pair(tokenizer, row.prompt, row.completion)
    return {"input_ids": list(pair.tokens), "labels": list(pair.labels)}
