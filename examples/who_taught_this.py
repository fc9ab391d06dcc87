"""Who taught the model this wrong capital? A small GPT-2 learns facts about countries, then, recorded, to answer
questions; some answers name the capital of another country. Asked about these in words that were not trained on, it
errs. The examples that taught it so are looked for (planted ones are known, so that the search can be judged), beside
a search for words (BM25) and chance; then the stage is trained again without the first ones, and without random ones.

    pip install -e '.[demo]'
    python examples/who_taught_this.py [--countries 40] [--planted 4]

Facts from the package countryinfo; offline, in about half a minute. Planted facts share words with the question, which
is why BM25 is hard to beat here; docs/errors.md has errors that a search for words does not find.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from dataclasses import replace
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
from datasets import Dataset, disable_progress_bars
from trl import SFTConfig, SFTTrainer

import trainer_attrib as ta
from trainer_attrib.analysis.verification import Removed
from trainer_attrib.evaluation.detection import detection
from trainer_attrib.evaluation.lexical import bm25_scores
from trainer_attrib.integrations.huggingface import AttributionCallback
from trainer_attrib_integrations.demo.facts import build_data, knowledge_queries, planted_queries
from trainer_attrib_integrations.demo.stages import build_tokenizer, initial_model


def train(
    model: Any, rows: tuple[dict[str, str], ...], tokenizer: Any, epochs: int, rate: float, *callbacks: Any
) -> None:
    """One stage."""
    arguments = SFTConfig(
        tempfile.mkdtemp(), num_train_epochs=epochs, per_device_train_batch_size=16, learning_rate=rate, seed=0,
        use_cpu=True, bf16=False, activation_checkpointing=False, dataloader_pin_memory=False, report_to="none",
        save_strategy="no", logging_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    data = Dataset.from_list(list(rows))
    SFTTrainer(model, arguments, train_dataset=data, processing_class=tokenizer, callbacks=list(callbacks)).train()


def main() -> None:
    """Train, ask, drop, train again."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--countries", type=int, default=40)
    parser.add_argument("--planted", type=int, default=4)
    options = parser.parse_args()
    disable_progress_bars()
    data = build_data(0)
    wrong, right = data.planted[: options.planted], data.true[: options.countries - options.planted]
    slugs = {fact.slug for fact in (*wrong, *right)}
    facts, rows = (tuple(r for r in part if r["id"].split("/")[2] in slugs) for part in (data.pretrain, data.sft))
    tokenizer, ledger = build_tokenizer(replace(data, pretrain=facts, sft=rows, dpo=())), tempfile.mkdtemp()
    model = initial_model(tokenizer, 0)
    train(model, facts, tokenizer, 12, 3e-3)
    train(
        model, rows, tokenizer, 5, 1e-3, AttributionCallback(ledger, stage="sft")
    )  # the last argument is what is added

    analyzer, asked, end = ta.Analyzer(ledger, model), planted_queries(wrong), str(tokenizer.eos_token)
    prompts, said, true = zip(*((q.prompt, q.completion + end, q.contrast + end) for q in asked), strict=True)
    error = analyzer.error_behavior("says the wrong capital", prompts, said, true, tokenizer=tokenizer)
    print(f"{sum(row['source'] == 'planted' for row in rows)} of {len(rows)} examples teach a wrong capital")
    print(
        f"the model prefers the wrong one for {float((error.values(model) > 0).double().mean()):.0%} of {len(wrong)}\n"
    )

    suspects = analyzer.suspects([error], recipe="grad_cos", k=4 * len(wrong))  # as many as were planted
    names, texts = suspects.examples.ids.astype(str), {row["id"]: row["prompt"] + row["completion"] for row in rows}
    planted = np.array([name.split("/")[1] == "planted" for name in names])
    words = bm25_scores([p + s for p, s in zip(prompts, said, strict=True)], [texts[name] for name in names]).mean(0)
    chance = np.random.default_rng(0).random(len(names))
    for title, scores in {"influence": suspects.scores, "BM25": words, "random": chance}.items():
        print(f"{title:10} {detection(scores, planted)}")
    print(f"\n{suspects}\n")

    pairs = [row["prompt"] for row in rows], [row["completion"] + end for row in rows]
    examples = ta.Examples.of_pairs(*pairs, tokenizer, ids=[row["id"] for row in rows])
    others = knowledge_queries(right[:20])
    prompts, said, true = zip(*((q.prompt, q.contrast + end, q.completion + end) for q in others), strict=True)
    knows = ta.Behavior.contrast("knows other capitals", prompts, true, said, tokenizer)
    print(analyzer.verify_removal("sft", Removed(suspects, examples, [error], [knows], draws=2)))


if __name__ == "__main__":
    main()
