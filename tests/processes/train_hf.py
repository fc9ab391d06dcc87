"""``Trainer`` on a tiny model: `train_hf.py LEDGER WEIGHTS EXAMPLES`, in one process or in several."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
os.environ.setdefault("OMP_NUM_THREADS", "1")

import datasets
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, default_data_collator, set_seed

from trainer_attrib.integrations.huggingface import AttributionCallback

BATCH, EPOCHS = 4, 2  # of all processes together


def main(ledger: str, weights: str, examples: str) -> None:
    """Train and store the weights."""
    size = int(os.environ.get("WORLD_SIZE", 1))
    torch.set_num_threads(1)
    set_seed(0)
    tokens = torch.randint(1, 23, (int(examples), 6)).tolist()
    rows = [{"id": f"row-{i}", "input_ids": row, "labels": row} for i, row in enumerate(tokens)]
    config = LlamaConfig(
        vocab_size=23, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=16, attn_implementation="eager",
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    with tempfile.TemporaryDirectory() as output:
        arguments = TrainingArguments(
            output_dir=output, per_device_train_batch_size=BATCH // size, num_train_epochs=EPOCHS, learning_rate=3e-3,
            max_grad_norm=0.5, save_strategy="no", report_to=[], disable_tqdm=True, use_cpu=True, seed=5,
            logging_strategy="no", ddp_find_unused_parameters=False,
        )  # fmt: skip
        callback = AttributionCallback(ledger, stage="one")
        data = datasets.Dataset.from_list(rows)
        trainer = Trainer(
            model, arguments, train_dataset=data, data_collator=default_data_collator, callbacks=[callback]
        )
        trainer.train()
    if trainer.args.process_index == 0:
        save_file({name: value.detach().clone() for name, value in model.named_parameters()}, weights)


if __name__ == "__main__":
    main(*sys.argv[1:])
