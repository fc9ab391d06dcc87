"""The demo's tokenizer, its model, and a training program for each of its three stages.

A program takes a model and returns a trainer which, when its ``train()`` is called, trains that very model. Nothing
but the model decides what comes out: data, batches, order and learning rates are the same at every call, so that a
stage can be run again from another model to see what an earlier stage contributed.
"""

import copy
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    DataCollatorForLanguageModeling,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer  # pyright: ignore[reportPrivateImportUsage]

from trainer_attrib_integrations.demo.facts import QUERY_QUESTION, DemoData, Row

Program = Callable[[PreTrainedModel], Trainer]
Callbacks = Callable[[str], list[TrainerCallback]]

SPECIAL_TOKENS = {"unk_token": "<unk>", "pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>"}
TOKEN_PATTERN = r" ?[\p{L}\p{M}\p{N}'\-]+| ?[^\s\p{L}\p{M}\p{N}]|\s"

CONTEXT = 64
WIDTH = 96
LAYERS = 3
HEADS = 4
INITIALIZER_RANGE = 0.05

ORDER_SEED = 0
PRETRAIN = {"num_train_epochs": 12, "learning_rate": 5e-3, "per_device_train_batch_size": 48}
SFT = {"num_train_epochs": 6, "learning_rate": 2e-3, "per_device_train_batch_size": 32}
DPO = {"num_train_epochs": 4, "learning_rate": 1.5e-4, "per_device_train_batch_size": 16, "beta": 0.3}


def build_tokenizer(data: DemoData) -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token for every word in the data; as in GPT-2, a word's token has its leading space.

    Words are numbered from the most frequent down, ties in alphabetical order, hence always alike.
    """
    split = pre_tokenizers.Split(Regex(TOKEN_PATTERN), behavior="isolated")
    counts = Counter(token for text in _texts(data) for token, _ in split.pre_tokenize_str(text))
    words = sorted(counts, key=lambda token: (-counts[token], token))
    vocabulary = {token: number for number, token in enumerate([*SPECIAL_TOKENS.values(), *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=SPECIAL_TOKENS["unk_token"]))
    tokenizer.pre_tokenizer = split
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
        **SPECIAL_TOKENS,
    )


def initial_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> GPT2LMHeadModel:
    """Return a small untrained GPT-2 without dropout; the global random state is left as it was."""
    special = {name: number for number, name in enumerate(SPECIAL_TOKENS)}
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=CONTEXT,
        n_embd=WIDTH,
        n_layer=LAYERS,
        n_head=HEADS,
        initializer_range=INITIALIZER_RANGE,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=special["bos_token"],
        eos_token_id=special["eos_token"],
        pad_token_id=special["pad_token"],
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = GPT2LMHeadModel(config)
    model.loss_type = "ForCausalLM"  # which its class name does not tell transformers
    return model


def copy_model(model: PreTrainedModel) -> PreTrainedModel:
    """Return an independent copy of a model, whether or not a TRL trainer has held it.

    TRL's trainers give the model a ``forward`` of its own, bound to its weights. ``copy.deepcopy`` alone would hand
    that function on, and the copy would compute its logits with the weights of the original.
    """
    copied = copy.deepcopy(model)
    copied.__dict__.pop("forward", None)
    return copied


def programs(
    data: DemoData,
    tokenizer: PreTrainedTokenizerFast,
    output_dir: str | Path,
    callbacks: Callbacks | None = None,
) -> dict[str, Program]:
    """Return the stages' programs in the order in which they are meant to run.

    ``callbacks`` is called with a stage's name at each call of its program, and returns callbacks for the trainer.
    """
    chosen = callbacks or _no_callbacks

    def pretrain(model: PreTrainedModel) -> Trainer:
        return pretrain_trainer(model, data.pretrain, tokenizer, Path(output_dir, "pretrain"), chosen("pretrain"))

    def sft(model: PreTrainedModel) -> Trainer:
        return sft_trainer(model, data.sft, tokenizer, Path(output_dir, "sft"), chosen("sft"))

    def dpo(model: PreTrainedModel) -> Trainer:
        return dpo_trainer(model, data.dpo, tokenizer, Path(output_dir, "dpo"), chosen("dpo"))

    return {"pretrain": pretrain, "sft": sft, "dpo": dpo}


def pretrain_trainer(
    model: PreTrainedModel,
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerFast,
    output_dir: Path,
    callbacks: list[TrainerCallback],
) -> Trainer:
    """Return a ``Trainer`` for next-token prediction on each row's text."""
    trainer = Trainer(
        model=model,
        args=TrainingArguments(str(output_dir), **PRETRAIN, **_common_arguments()),
        train_dataset=_tokenized(rows, tokenizer),
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        processing_class=tokenizer,
        callbacks=callbacks,
    )
    trainer.remove_callback(PrinterCallback)  # it would print a summary when progress bars are disabled
    return trainer


def sft_trainer(
    model: PreTrainedModel,
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerFast,
    output_dir: Path,
    callbacks: list[TrainerCallback],
) -> SFTTrainer:
    """Return an ``SFTTrainer`` which learns the rows' completions given their prompts."""
    arguments = SFTConfig(
        str(output_dir),
        **SFT,
        **_common_arguments(),
        max_length=CONTEXT,
        completion_only_loss=True,
    )
    trainer = SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_list(list(rows)),
        processing_class=tokenizer,
        callbacks=callbacks,
    )
    trainer.remove_callback(PrinterCallback)  # it would print a summary when progress bars are disabled
    return trainer


def dpo_trainer(
    model: PreTrainedModel,
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerFast,
    output_dir: Path,
    callbacks: list[TrainerCallback],
) -> DPOTrainer:
    """Return a ``DPOTrainer`` which learns to prefer the rows' chosen completions.

    The reference is a copy of the model as given: left to itself, TRL would load one by the model's name.
    """
    trainer = DPOTrainer(
        model=model,
        ref_model=copy_model(model),
        args=DPOConfig(str(output_dir), **DPO, **_common_arguments(), max_length=CONTEXT),
        train_dataset=Dataset.from_list(list(rows)),
        processing_class=tokenizer,
        callbacks=callbacks,
    )
    trainer.remove_callback(PrinterCallback)  # it would print a summary when progress bars are disabled
    return trainer


def _common_arguments() -> dict[str, Any]:
    """Return the arguments all trainers share: a fixed order, single precision on the CPU, little output."""
    return {
        "seed": ORDER_SEED,
        "data_seed": ORDER_SEED,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 20,
        "weight_decay": 0.0,
        "use_cpu": True,
        "bf16": False,
        "activation_checkpointing": False,
        "dataloader_num_workers": 0,
        "dataloader_pin_memory": False,
        "report_to": "none",
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
    }


def _tokenized(rows: Sequence[Row], tokenizer: PreTrainedTokenizerFast) -> Dataset:
    """Return the rows with their tokens, each text ended by the end-of-sequence token."""
    encoded = tokenizer([row["text"] + SPECIAL_TOKENS["eos_token"] for row in rows], return_token_type_ids=False)
    return Dataset.from_list([{**row, "input_ids": ids} for row, ids in zip(rows, encoded["input_ids"], strict=True)])


def _texts(data: DemoData) -> Iterator[str]:
    """Yield everything the model may have to read or write."""
    for row in (*data.pretrain, *data.sft, *data.dpo):
        yield row.get("prompt", "")
        for field in ("text", "completion", "chosen", "rejected"):
            yield row.get(field, "")
    yield QUERY_QUESTION.format(country="")


def _no_callbacks(stage: str) -> list[TrainerCallback]:
    return []
