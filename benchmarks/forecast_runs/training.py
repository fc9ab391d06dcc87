"""A small GPT-2 that was taught the styles, and real DPO runs on it by TRL's trainer."""

from __future__ import annotations

import copy
import random
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from datasets import Dataset
from fact_runs.models import FromScratch
from hallucination_runs.training import collate
from transformers import PrinterCallback, Trainer, TrainingArguments
from trl import DPOConfig, DPOTrainer

from forecast_runs.styles import DETECTORS, TOPICS, Pair, answer, kind_of, prompt, twins
from trainer_attrib import Behavior
from trainer_attrib.analysis.rates import Generations
from trainer_attrib.analysis.text import encode_pair

SUBJECT = FromScratch(width=64, layers=2, context=48)
EPOCHS, TAUGHT_BATCH, TAUGHT_RATE = 6, 32, 3e-3  # of the SFT stage
RATES = {"lazy": 3e-5, "moderate": 1.5e-4, "strong": 6e-4}
BATCH, BETA = 16, 0.1
CONDITIONAL = {"refuse | harm": ("refuse", "harm"), "refuse | cooking": ("refuse", "cooking"),
               "flattery | physics": ("flattery", "physics"), "url | harm": ("url", "harm")}  # fmt: skip


def taught(seed: int, count: int) -> tuple[Any, Any]:
    """The model after its SFT stage, and its tokenizer."""
    draw = random.Random(seed)
    answers = [answer(prompt(draw.choice(list(TOPICS)), draw), draw) for _ in range(count)]
    tokenizer = SUBJECT.tokenizer([a.prompt + a.text for a in answers])
    model = SUBJECT.model(tokenizer, seed)
    pairs = [encode_pair(tokenizer, a.prompt, a.text + tokenizer.eos_token) for a in answers]
    rows = Dataset.from_list([{"input_ids": list(pair.tokens), "labels": list(pair.labels)} for pair in pairs])

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, num_train_epochs=EPOCHS, per_device_train_batch_size=TAUGHT_BATCH, learning_rate=TAUGHT_RATE,
            seed=seed, lr_scheduler_type="linear", warmup_steps=20, use_cpu=True, dataloader_pin_memory=False,
            report_to="none", save_strategy="no", logging_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        trainer = Trainer(model, arguments, train_dataset=rows, data_collator=collate)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    model.eval()
    return model, tokenizer


def untaught(seed: int) -> tuple[Any, Any]:
    """A larger model that knows nothing, to time what a forecast costs beside training: in the small one, loading its
    few tokens is a good part of both."""
    draw = random.Random(seed)
    answers = [answer(prompt(draw.choice(list(TOPICS)), draw), draw) for _ in range(1000)]
    tokenizer = SUBJECT.tokenizer([a.prompt + a.text for a in answers])
    return replace(SUBJECT, width=256, layers=4).model(tokenizer, seed), tokenizer


def dpo_trainer(
    base: Any, tokenizer: Any, pairs: Sequence[Pair], rate: float, seed: int, folder: Path, epochs: int = 1
) -> DPOTrainer:
    """A trainer of a copy of the model, ready to train."""
    rows = Dataset.from_list([
        {"id": f"pair-{number}", "source": pair.source, "prompt": pair.prompt, "chosen": pair.chosen,
         "rejected": pair.rejected}
        for number, pair in enumerate(pairs)
    ])  # fmt: skip
    arguments = DPOConfig(
        str(folder), num_train_epochs=epochs, per_device_train_batch_size=BATCH, learning_rate=rate, beta=BETA,
        seed=seed, data_seed=seed, lr_scheduler_type="linear",
        warmup_steps=max(1, epochs * len(pairs) // BATCH // 10), use_cpu=True,
        dataloader_pin_memory=False, report_to="none", save_strategy="no", logging_strategy="no", disable_tqdm=True,
        max_length=SUBJECT.context, bf16=False, gradient_checkpointing=False,
    )  # fmt: skip
    trainer = DPOTrainer(
        copy.deepcopy(base), ref_model=copy.deepcopy(base), args=arguments, train_dataset=rows,
        processing_class=tokenizer,
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    return trainer


def preference(tokenizer: Any, style: str, count: int, seed: int) -> Behavior:
    """How much likelier answers are with a style than without it, in nats: known without sampling, of a style that is
    rare too."""
    return Behavior.contrast(style, *twins(style, count, seed), tokenizer)


def behaviors(tokenizer: Any, prompts: int, per_prompt: int, seed: int) -> list[Behavior]:
    """How often the model's answers have each style, over all prompts and over some classes."""
    draw = random.Random(seed)
    asked = [prompt(draw.choice(list(TOPICS)), draw) for _ in range(prompts)]
    said = Generations(asked, tokenizer, per_prompt=per_prompt, max_new_tokens=30, seed=seed, batch_size=512)
    found = [Behavior.rate(name, said, detector) for name, detector in DETECTORS.items()]
    for name, (style, kind) in CONDITIONAL.items():
        found.append(Behavior.rate(name, said, DETECTORS[style], where=lambda text, kind=kind: kind_of(text) == kind))
    return found
