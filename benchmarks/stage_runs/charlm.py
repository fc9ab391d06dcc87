"""A tiny language model of characters in four stages, trained by transformers' Trainer.

Stages are the domains of ``texts.py``: licence, Python, sums, questions. The model is a GPT-2 of two layers of width
32 over 24 characters, about 21 thousand parameters; AdamW with betas (0.9, 0.95), weight decay 0.1, gradients clipped
at 1, a cosine schedule in each stage.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import GPT2Config, GPT2LMHeadModel, PrinterCallback, Trainer, TrainingArguments, default_data_collator

from stage_runs.digits import margins
from stage_runs.regimes import Regime, order_seed, recording
from stage_runs.texts import ALPHABET, WINDOW, texts, windows
from trainer_attrib import Behavior
from trainer_attrib.analysis.programs import Program
from trainer_attrib.integrations.huggingface import AttributionCallback

STAGES = ("licence", "python", "sums", "questions")
BATCH, BLOCKS, BLOCK = 32, 6, 8  # six queries of a domain, of eight windows each


class CharacterModel:
    """The pipeline at one regime and seed; the seed decides initial weights and orders."""

    stages = STAGES

    def __init__(self, regime: Regime, seed: int) -> None:
        self.regime, self.seed = regime, seed

    def model(self) -> nn.Module:
        """New weights."""
        config = GPT2Config(
            n_layer=2, n_embd=32, n_head=4, n_inner=64, vocab_size=len(ALPHABET), n_positions=WINDOW,
            initializer_range=0.1, tie_word_embeddings=False, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
            bos_token_id=0, eos_token_id=0, use_cache=False,
        )  # fmt: skip
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            model = GPT2LMHeadModel(config)
        model.loss_type = "ForCausalLM"  # which its class name does not tell transformers
        return model

    def programs(self, ledger: Path | None = None, order: int = 0) -> dict[str, Program]:
        """A Trainer of each stage."""
        return {name: self._program(number, ledger, order) for number, name in enumerate(STAGES)}

    def behaviors(self) -> list[Behavior]:
        """Mean loss and mean margin of the next character over blocks of held-out windows of each domain."""
        blocks = {
            f"{domain} {number}": windows(domain)[1][number * BLOCK : (number + 1) * BLOCK]
            for domain in texts()
            for number in range(BLOCKS)
        }
        items, names = list(blocks.values()), list(blocks)
        return [
            Behavior("loss", items, _losses, names, unit="nats per character"),
            Behavior("margin", items, _margins, names, unit="logits"),
        ]

    def _program(self, number: int, ledger: Path | None, order: int) -> Program:
        name, seed = STAGES[number], order_seed(self.seed, number, order)

        def program(model: Any) -> Trainer:
            callbacks = [] if ledger is None else recording(AttributionCallback, ledger, name, STAGES[:number])
            arguments = TrainingArguments(
                tempfile.gettempdir(), per_device_train_batch_size=BATCH, max_steps=self.regime.steps[number],
                learning_rate=self.regime.rates[number], lr_scheduler_type="cosine", weight_decay=0.1, adam_beta2=0.95,
                max_grad_norm=1.0, seed=seed, data_seed=seed, use_cpu=True, dataloader_pin_memory=False,
                dataloader_drop_last=True,
                report_to="none", save_strategy="no", logging_strategy="no", disable_tqdm=True,
            )  # fmt: skip
            trainer = Trainer(
                model=model, args=arguments, train_dataset=_rows(name), data_collator=default_data_collator,
                callbacks=callbacks,
            )  # fmt: skip
            trainer.remove_callback(PrinterCallback)
            return trainer

        return program


def quiet() -> None:
    """Transformers says much at every training."""
    transformers.logging.set_verbosity_error()


def _rows(domain: str) -> Dataset:
    codes = windows(domain)[0].tolist()
    return Dataset.from_dict({"input_ids": codes, "labels": codes})


def _next(model: nn.Module, items: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Logits and labels of all next characters, of one item after another."""
    blocks = torch.cat(items)
    return model(input_ids=blocks).logits[:, :-1].flatten(0, 1), blocks[:, 1:].flatten()


def _losses(model: nn.Module, items: list[Tensor]) -> Tensor:
    return cross_entropy(*_next(model, items), reduction="none").reshape(len(items), -1).mean(1)


def _margins(model: nn.Module, items: list[Tensor]) -> Tensor:
    return margins(*_next(model, items)).reshape(len(items), -1).mean(1)
