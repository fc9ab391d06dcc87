"""Stages of a small Llama recorded through the Trainer, with adapters that come and go."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import numpy as np
import peft
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from tests.conftest import VOCABULARY, PadCollator
from trainer_attrib import Behavior
from trainer_attrib.integrations.huggingface import AttributionCallback
from trainer_attrib.types import SketchConfig

TARGETS = ["q_proj", "down_proj"]
TARGET_WEIGHTS = tuple(
    sorted(f"model.layers.{i}.{name}.weight" for i in range(2) for name in ("self_attn.q_proj", "mlp.down_proj"))
)


def llama(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2, pad_token_id=0))


def adapted(model: Any, **settings: Any) -> Any:
    """The model with an adapter, LoRA on two layers of each block unless told otherwise."""
    kind = getattr(peft, settings.pop("kind", "LoraConfig"))
    return peft.get_peft_model(model, kind(**{"target_modules": TARGETS, **settings}))


def merged(model: Any) -> Any:
    """The model with its adapter merged, all weights trainable."""
    return model.merge_and_unload().requires_grad_(True)


def adapters_of(*names: str) -> tuple[str, ...]:
    layers = [name.removesuffix(".weight") for name in TARGET_WEIGHTS]
    return tuple(sorted(f"{layer}.lora_{side}.{name}.weight" for layer in layers for side in "AB" for name in names))


def rows_of(stage: str, seed: int = 0) -> list[dict[str, Any]]:
    """Eight named rows of 4 to 10 tokens."""
    random = np.random.default_rng(seed)
    lengths = random.integers(4, 11, 8)
    return [
        {"id": f"{stage}-{i}", "input_ids": random.integers(2, VOCABULARY, n).tolist()} for i, n in enumerate(lengths)
    ]


def trainer_of(model: Any, output: Path, stage: str, callbacks: list[Any], seed: int = 0, **settings: Any) -> Trainer:
    defaults = {
        "per_device_train_batch_size": 4, "num_train_epochs": 1, "learning_rate": 1e-2, "save_strategy": "no",
        "report_to": [], "disable_tqdm": True, "use_cpu": True, "output_dir": str(output),
    }  # fmt: skip
    rows = datasets.Dataset.from_list(rows_of(stage, seed))
    arguments = TrainingArguments(**{**defaults, **settings})
    return Trainer(model, arguments, train_dataset=rows, data_collator=PadCollator(), callbacks=callbacks)


def record(model: Any, place: Path, stage: str, seed: int = 0, **settings: Any) -> Any:
    """Train the model as a stage of the ledger ``place / "ledger"``; returns it."""
    sketch = settings.pop("sketch", SketchConfig(rank=4, dtype="float32", correction="none"))
    callback = AttributionCallback(place / "ledger", stage=stage, strict=True, sketch=sketch)
    trainer_of(model, place / "output", stage, [callback], seed, **settings).train()
    return model


def losses(seed: int = 9) -> Behavior:
    """Loss of three texts that no stage trained on."""

    def measure(model: Any, items: list[Any]) -> torch.Tensor:
        batch = PadCollator()(items)
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
        return torch.nn.functional.cross_entropy(logits.transpose(1, 2), batch["labels"][:, 1:], reduction="none").sum(
            1
        )

    return Behavior("loss", rows_of("query", seed)[:3], measure)
