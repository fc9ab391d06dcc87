"""A stage that a Trainer recorded, run again from its ledger and its texts, without the trainer."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers")
pytest.importorskip("datasets")

import datasets
from transformers import Trainer, TrainingArguments

from trainer_attrib import Analyzer, Behavior, Examples, SketchConfig
from trainer_attrib.analysis.verification import Removed
from trainer_attrib.integrations.huggingface import AttributionCallback


@pytest.mark.parametrize("named", [True, False])
def test_a_trainers_stage_is_run_again_to_where_it_ended(tmp_path, tiny_llama, tokenizer, words, pad_collator, named):
    """Schedule, clipping, accumulated micro-batches, a last one that is short, token means over the whole step; without
    an id column, recorded examples are known by their texts."""
    texts = [text for text in dict.fromkeys(words(9) for _ in range(26)) if len(text.split()) > 2]
    rows = [{"input_ids": tokenizer(text)["input_ids"]} for text in texts]
    rows = [{**row, "labels": row["input_ids"], **({"id": f"row-{n}"} if named else {})} for n, row in enumerate(rows)]
    model = tiny_llama()
    arguments = TrainingArguments(
        str(tmp_path / "out"), per_device_train_batch_size=3, gradient_accumulation_steps=2, num_train_epochs=4,
        learning_rate=5e-3, warmup_steps=3, weight_decay=0.1, max_grad_norm=0.5, save_strategy="no", report_to=[],
        disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    callback = AttributionCallback(tmp_path / "ledger", stage="sft", strict=True, sketch=SketchConfig(rank=4))
    data = datasets.Dataset.from_list(rows)
    Trainer(
        model, arguments, train_dataset=data, data_collator=pad_collator(), processing_class=tokenizer,
        callbacks=[callback],
    ).train()  # fmt: skip
    given = Examples.of_texts(texts, tokenizer, ids=[f"row-{n}" for n in range(len(texts))])
    analyzer = Analyzer(tmp_path / "ledger", model)
    error = Behavior.completion("says it", [texts[4].split()[0]], [" " + " ".join(texts[4].split()[1:])], tokenizer)
    found = analyzer.suspects([error], recipe="grad_cos", k=2)
    assert all(row.example.startswith("row-") is named for row in found.rows)
    verified = analyzer.verify_removal("sft", Removed(found, given, [error]))
    assert verified.drift < 1e-4  # float32
    assert not any("target tokens" in caveat for caveat in verified.caveats)
    assert verified.removed == 2
    rows = [{"text": text, "id": f"row-{n}"} for n, text in enumerate(texts)]
    kept = found.keep(rows)
    assert len(kept) == len(rows) - 2
    assert all(row.text not in [left["text"] for left in kept] for row in found.rows if row.text)
    pairs = [(" ".join(text.split()[:2]), " ".join(["", *text.split()[2:]])) for text in texts]
    other = Examples.of_pairs(*zip(*pairs, strict=True), tokenizer, ids=given.ids)  # without the prompt's loss
    verified = analyzer.verify_removal("sft", Removed(found, other, [error]))
    assert verified.drift > 0.01
    assert any(f"{len(texts)} examples have other numbers of target" in caveat for caveat in verified.caveats)
