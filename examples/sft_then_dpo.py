"""SFT, then DPO, both by TRL's trainers and both recorded: which of the two made the model know capitals, which made it
answer in full sentences, and which examples did? Stage effects by two estimates, beside really training without the
stage; then the examples of both stages that most made it prefer one full answer.

    pip install -e '.[demo]'
    python examples/sft_then_dpo.py [--countries 24] [--report page.html]

Facts from the package countryinfo; offline, in about a minute.
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
from trainer_attrib.integrations.huggingface import AttributionCallback
from trainer_attrib_integrations.demo.facts import Query, build_data, knowledge_queries, style_queries
from trainer_attrib_integrations.demo.stages import build_tokenizer, copy_model, initial_model

COMMON: dict[str, Any] = {
    "per_device_train_batch_size": 16, "seed": 0, "use_cpu": True, "bf16": False, "activation_checkpointing": False,
    "dataloader_pin_memory": False, "report_to": "none", "save_strategy": "no", "logging_strategy": "no",
    "disable_tqdm": True,
}  # fmt: skip


def stages(sft: list[dict[str, str]], dpo: list[dict[str, str]], tokenizer: Any) -> dict[str, Any]:
    """How each stage is trained, from the model to the trainer; ``ledger`` records it."""

    def callbacks(stage: str, ledger: str | None) -> list[AttributionCallback]:
        return [AttributionCallback(ledger, stage=stage)] if ledger else []

    def sft_trainer(model: Any, ledger: str | None = None) -> SFTTrainer:
        arguments = SFTConfig(tempfile.mkdtemp(), num_train_epochs=12, learning_rate=3e-3, **COMMON)
        return SFTTrainer(
            model, arguments, train_dataset=Dataset.from_list(sft), processing_class=tokenizer,
            callbacks=callbacks("sft", ledger),
        )  # fmt: skip

    def dpo_trainer(model: Any, ledger: str | None = None) -> DPOTrainer:
        arguments = DPOConfig(tempfile.mkdtemp(), num_train_epochs=6, learning_rate=3e-4, beta=0.3, **COMMON)
        return DPOTrainer(
            model, copy_model(model), arguments, train_dataset=Dataset.from_list(dpo), processing_class=tokenizer,
            callbacks=callbacks("dpo", ledger),
        )  # fmt: skip

    return {"sft": sft_trainer, "dpo": dpo_trainer}


def contrast(name: str, queries: list[Query], tokenizer: Any) -> ta.Behavior:
    """An answer against another one, each with the end of the text."""
    columns = zip(*((q.prompt, q.completion + "<eos>", q.contrast + "<eos>") for q in queries), strict=True)
    return ta.Behavior.contrast(name, *columns, tokenizer)


def main() -> None:
    """Train both stages, then ask."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--countries", type=int, default=24)
    parser.add_argument("--report", help="file for the same as a page")
    options = parser.parse_args()
    disable_progress_bars()
    data = build_data(0)
    facts = data.true[: options.countries]
    sft, dpo = ([r for r in part if r["id"].split("/")[2] in {f.slug for f in facts}] for part in (data.sft, data.dpo))
    tokenizer = build_tokenizer(replace(data, pretrain=(), sft=tuple(sft), dpo=tuple(dpo)))
    model, ledger, programs = initial_model(tokenizer, 0), tempfile.mkdtemp(), stages(sft, dpo, tokenizer)
    for program in programs.values():
        program(model, ledger).train()

    analyzer = ta.Analyzer(ledger, model)
    knows = contrast("knows capitals", knowledge_queries(facts), tokenizer)
    full = contrast("answers in full sentences", style_queries(facts), tokenizer)
    effects = analyzer.stage_effects([knows, full], ["subtract", "replay", "retrain"], programs)
    print(effects)
    influence = analyzer.influence([contrast(full.name, style_queries(facts[:1]), tokenizer)])
    print(f"\n{influence}")
    if options.report:
        print(f"\n{analyzer.report(options.report, effects, influence, title='SFT, then DPO')}")


if __name__ == "__main__":
    main()
