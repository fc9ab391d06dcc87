"""What will these preference pairs do to the model, which of them do what nobody wants, and what happens without it?
A small GPT-2 answers questions about capitals, now short, now in a full sentence, now and then with flattery. The pairs
prefer full sentences, and one in five flattery. Before DPO trains: a forecast with error bars, the pairs behind it, and
weights for the pairs that keep flattery where it is. Then both data sets are really trained on, and measured.

    pip install -e '.[demo]'
    python examples/forecast_and_reshape.py [--countries 40] [--samples 8]

Facts from the package countryinfo; offline, in about two minutes.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from dataclasses import replace
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from datasets import Dataset, disable_progress_bars
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

import trainer_attrib as ta
from trainer_attrib.integrations.huggingface import apply_plan, forecast
from trainer_attrib_integrations.demo.facts import build_data
from trainer_attrib_integrations.demo.stages import build_tokenizer, copy_model, initial_model

FLATTERY = " Great question!"
COMMON: dict[str, Any] = {
    "per_device_train_batch_size": 16, "seed": 0, "use_cpu": True, "bf16": False, "activation_checkpointing": False,
    "dataloader_pin_memory": False, "report_to": "none", "save_strategy": "no", "logging_strategy": "no",
    "disable_tqdm": True,
}  # fmt: skip


def dpo_trainer(model: Any, pairs: list[dict[str, str]], tokenizer: Any) -> DPOTrainer:
    """Of a copy of the model, ready to train."""
    arguments = DPOConfig(tempfile.mkdtemp(), num_train_epochs=3, learning_rate=1e-4, beta=0.3, **COMMON)
    return DPOTrainer(
        copy_model(model), copy_model(model), arguments, train_dataset=Dataset.from_list(pairs),
        processing_class=tokenizer,
    )  # fmt: skip


def main() -> None:
    """Forecast, reshape, train both ways, compare."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--countries", type=int, default=40)
    parser.add_argument("--samples", type=int, default=8, help="answers of each question")
    options = parser.parse_args()
    disable_progress_bars()
    data = build_data(0)
    slugs = {fact.slug for fact in data.true[: options.countries]}
    rows, pairs = ([dict(r) for r in part if r["id"].split("/")[2] in slugs] for part in (data.sft, data.dpo))
    for row in rows[::6]:
        row["completion"] = FLATTERY + row["completion"]
    for pair in pairs[::5]:
        pair |= {"source": "flattery", "chosen": FLATTERY + pair["chosen"], "rejected": pair["chosen"]}
    tokenizer = build_tokenizer(replace(data, pretrain=(), sft=tuple(rows), dpo=tuple(pairs)))
    model = initial_model(tokenizer, 0)
    arguments = SFTConfig(tempfile.mkdtemp(), num_train_epochs=12, learning_rate=3e-3, **COMMON)
    SFTTrainer(model, arguments, train_dataset=Dataset.from_list(rows), processing_class=tokenizer).train()

    questions = [row["prompt"] for row in rows if row["source"] == "true"]
    said = ta.Generations(questions, tokenizer, per_prompt=options.samples, max_new_tokens=16)
    behaviors = [ta.Behavior.rate("flattery", said, "Great"), ta.Behavior.rate("full sentence", said, "The capital of")]
    before = [behavior.values(model).mean() for behavior in behaviors]
    trainer = dpo_trainer(model, pairs, tokenizer)
    outlook = forecast(trainer, behaviors)
    told = outlook.contributions()
    print(outlook, told, sep="\n\n")
    first = [row.source for row in told.top("flattery", len(pairs[::5]))]
    print(f"\n{first.count('flattery')} of the first {len(first)} pairs are those that prefer flattery")
    reshaped = outlook.reshape(keep_below={"flattery": 0.0})
    print(f"\n{reshaped}\n")

    for name, predicted, plan in (("as it is", outlook, None), ("reshaped", reshaped.after, reshaped)):
        again = dpo_trainer(model, pairs, tokenizer)
        if plan is not None:
            apply_plan(again, plan)
        again.train()
        for behavior, old in zip(behaviors, before, strict=True):
            row, change = predicted.of(behavior.name), behavior.values(again.model) - old
            error = float(change.std() / len(change) ** 0.5)
            print(f"{name}: {behavior.name:14} forecast {row.predicted:+.3f} ± {row.error_bar:.3f}, "
                  f"really {float(change.mean()):+.3f} ± {error:.3f}")  # fmt: skip


if __name__ == "__main__":
    main()
