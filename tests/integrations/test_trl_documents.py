"""Several documents in one row: a document's row is what it would be alone, where attention keeps them apart."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch

trl = pytest.importorskip("trl")

import transformers  # noqa: E402
from datasets import Dataset  # noqa: E402

from tests.support import support  # noqa: E402
from trainer_attrib.capture.example_ids import hash_rows, id_strings  # noqa: E402
from trainer_attrib_integrations.loss_forms import why_documents_mix  # noqa: E402

MODELS = {
    "llama-sdpa": lambda llama, gpt2: llama(attn_implementation="sdpa"),
    "llama-eager": lambda llama, gpt2: llama(attn_implementation="eager"),
    "gpt2": lambda llama, gpt2: gpt2(0),
}
CASES = {
    "bfd": ("llama-sdpa", "document", {"packing": True, "max_length": 24}),
    "bfd-eager": ("llama-eager", "document", {"packing": True, "max_length": 24}),
    "bfd-gpt2": ("gpt2", "document", {"packing": True, "max_length": 24}),
    "bfd-padded": ("llama-sdpa", "document", {"packing": True, "max_length": 24, "pad_to_multiple_of": 32}),
    "bfd_split": ("llama-sdpa", "fragment", {"packing": True, "packing_strategy": "bfd_split", "max_length": 9}),
    "padding_free": ("llama-sdpa", "document", {"padding_free": True, "max_length": None}),
    "padding_free-gpt2": ("gpt2", "document", {"padding_free": True, "max_length": None}),
}
MARKS = {
    "bfd": support("TRL", "SFTTrainer, packing, strategy bfd"),
    "bfd_split": support("TRL", "SFTTrainer, packing, strategy bfd_split"),
    "padding_free": support("TRL", "SFTTrainer, padding-free"),
}


@pytest.fixture
def documents(words: Callable) -> list[dict[str, str]]:
    """Ten texts of 2 to 14 words."""
    return [{"id": f"doc-{i}", "source": "made", "text": words(14)} for i in range(10)]


@pytest.fixture
def sft(settings: Callable, trained: Callable, tokenizer: Any) -> Callable[..., Any]:
    """Trains a model on texts by the SFTTrainer."""

    def run(model: Any, rows: list[dict[str, Any]], **changes: Any) -> Any:
        return trained(
            lambda callbacks: trl.SFTTrainer(
                model, args=trl.SFTConfig(**settings(**changes)), train_dataset=Dataset.from_list(rows),
                processing_class=tokenizer, callbacks=callbacks,
            ),
        )  # fmt: skip

    return run


def _documents_of(trainer: Any) -> dict[str, list[int]]:
    """Tokens of every document of the trainer's data set, by the hash of the document alone."""
    found = []
    for row in trainer.train_dataset:
        lengths = row.get("seq_lengths") or [len(row["input_ids"])]
        edges = torch.tensor([0, *lengths]).cumsum(0).tolist()
        found += [row["input_ids"][start:end] for start, end in pairwise(edges)]
    return {id_strings(hash_rows(torch.tensor([d]), None, torch.tensor([d])))[0]: d for d in found}


@pytest.mark.parametrize("case", [pytest.param(c, marks=MARKS.get(c.split("-")[0], ())) for c in CASES])
def test_a_documents_row_is_its_gradient_alone(
    case: str, documents: list[dict[str, str]], sft: Callable, tiny_llama: Callable, tiny_gpt2: Callable,
    tokenizer: Any, close: Callable,
) -> None:  # fmt: skip
    """Ids, texts, token counts and the denominator too."""
    kind, unit, changes = CASES[case]
    run = sft(MODELS[kind](tiny_llama, tiny_gpt2), documents, **changes)
    assert (run.stage.meta["unit"], run.stage.meta["coupled_loss"]) == (unit, [])
    alone = _documents_of(run.trainer)
    named = dict(zip((d["id"] for d in documents), alone.values(), strict=True)) if "free" in case else alone
    assert len(run.table) >= 4
    assert set(run.texts) == {row["example"] for row in run.table} <= set(named)
    tokens = sum(row["tokens"] for row in run.table)
    for row, sketch in zip(run.table, run.sketches, strict=True):
        document = named[row["example"]]
        assert row["tokens"] == len(document) - 1
        assert (row["denominator"], row["denominator_source"]) == (pytest.approx(tokens, rel=1e-4), "measured")
        assert run.texts[row["example"]] == tokenizer.decode(document, skip_special_tokens=True)
        close(sketch, run.gradient(lambda document=document: -run.likelihood(document)), relative=1e-5)
    assert run.residual < 1e-5
    assert len({row["row"] for row in run.table if row["micro_batch"] == 0}) > 1, "several documents shared a row"


@support("TRL", "SFTTrainer, packing, completion-only loss")
def test_only_completions_count_in_packed_rows(
    words: Callable, sft: Callable, tiny_llama: Callable, close: Callable, tokenizer: Any
) -> None:
    rows = [{"prompt": words(4), "completion": " " + words(6)} for _ in range(10)]
    run = sft(tiny_llama(), rows, packing=True, max_length=24, completion_only_loss=True)
    lengths = {f"{r['prompt']}{r['completion']}": len(r["completion"].split()) + 1 for r in rows}
    assert {run.texts[row["example"]]: row["tokens"] for row in run.table}.items() <= lengths.items()
    for row, sketch in zip(run.table, run.sketches, strict=True):
        tokens = tokenizer(run.texts[row["example"]])["input_ids"] + [tokenizer.eos_token_id]
        start = len(tokens) - row["tokens"]
        close(sketch, run.gradient(lambda t=tokens, s=start: -run.likelihood(t, s)), relative=1e-5)


@support("TRL", "SFTTrainer, packing, strategy wrapped")
@pytest.mark.parametrize("padding_free", [False, pytest.param(True, id="padding-free")])
def test_a_row_of_wrapped_text_is_one_example(
    padding_free: bool, documents: list[dict[str, str]], sft: Callable, tiny_llama: Callable, close: Callable,
    caplog: Any,
) -> None:  # fmt: skip
    """Documents are cut and see each other, so that the packed row is the smallest thing with a gradient of its own."""
    run = sft(
        tiny_llama(), documents, packing=True, packing_strategy="wrapped", max_length=16, padding_free=padding_free
    )
    assert run.stage.meta["unit"] == "packed row"
    assert "packing='wrapped' cuts documents" in caplog.text
    alone = _documents_of(run.trainer)
    for row, sketch in zip(run.table, run.sketches, strict=True):
        tokens = alone[row["example"]]
        assert row["tokens"] == len(tokens) - 1
        close(sketch, run.gradient(lambda tokens=tokens: -run.likelihood(tokens)), relative=1e-5)


@support("TRL", "SFTTrainer, padding-free, a model that mixes the documents of a row")
def test_documents_that_see_each_other_are_one_example(
    documents: list[dict[str, str]], sft: Callable, close: Callable, caplog: Any
) -> None:
    """Bloom's attention has no positions to tell documents by."""
    torch.manual_seed(0)
    config = transformers.BloomConfig(
        vocab_size=28, hidden_size=16, n_layer=2, n_head=2, pad_token_id=0, eos_token_id=1, use_cache=False
    )
    run = sft(transformers.BloomForCausalLM(config), documents, padding_free=True, max_length=None)
    assert (run.stage.meta["unit"], run.stage.meta["layout"]) == ("packed row", "rows")
    assert "BloomForCausalLM does not mask by position_ids" in caplog.text
    assert [row["row"] for row in run.table] == [0, 0], "one row per micro-batch"
    assert run.residual < 1e-5


@support("Data", "transformers.DataCollatorWithFlattening")
def test_flattened_batches_of_the_plain_trainer_are_told_apart_too(
    settings: Callable, trained: Callable, token_rows: Callable, tiny_llama: Callable, close: Callable
) -> None:
    rows = [{"id": str(i), "input_ids": [t % 28 for t in row["input_ids"]]} for i, row in enumerate(token_rows(6))]
    model = tiny_llama()
    run = trained(
            lambda callbacks: transformers.Trainer(
            model, transformers.TrainingArguments(**settings(max_grad_norm=0)), train_dataset=Dataset.from_list(rows),
            data_collator=transformers.DataCollatorWithFlattening(), callbacks=callbacks,
        ),
    )  # fmt: skip
    tokens = {row["id"]: row["input_ids"] for row in rows}
    assert len(run.table) == 4
    for row, sketch in zip(run.table, run.sketches, strict=True):
        close(sketch, run.gradient(lambda t=tokens[row["example"]]: -run.likelihood(t)), relative=1e-5)


def test_packed_training_is_bit_identical(
    documents: list[dict[str, str]], settings: Callable, trained: Callable, tiny_llama: Callable, tokenizer: Any
) -> None:
    def trainer_of(model: Any, callbacks: list[Any]) -> Any:
        arguments = trl.SFTConfig(**settings(packing=True, max_length=24, max_steps=4, logging_steps=1))
        data = Dataset.from_list(documents)
        return trl.SFTTrainer(
            model, args=arguments, train_dataset=data, processing_class=tokenizer, callbacks=callbacks
        )

    def outcome(trainer: Any, model: Any) -> Any:
        timed = ("runtime", "per_second")
        logs = [{k: v for k, v in log.items() if not any(t in k for t in timed)} for log in trainer.state.log_history]
        return logs, [p.detach().clone() for p in model.parameters()], torch.get_rng_state()

    plain = trainer_of(model := tiny_llama(), [])
    plain.train()
    expected_logs, expected, expected_state = outcome(plain, model)
    watched = tiny_llama()
    run = trained(lambda callbacks: _keeping(trainer_of(watched, callbacks), outcome, watched))
    logs, weights, state = run.trainer.outcome
    assert logs == expected_logs
    assert all(torch.equal(a, b) for a, b in zip(weights, expected, strict=True))
    assert torch.equal(state, expected_state)


def _keeping(trainer: Any, outcome: Callable, model: Any) -> Any:
    """Notes the outcome at the end of training, before the weights are put back."""
    train = trainer.train

    def noted() -> None:
        train()
        trainer.outcome = outcome(trainer, model)

    trainer.train = noted
    return trainer


@pytest.mark.parametrize(
    ("kind", "apart"),
    [
        ("Llama", True), ("Mistral", True), ("Qwen2", True), ("Qwen3", True), ("Gemma2", True), ("GPT2", True),
        ("Phi3", True), ("Mamba", False), ("Jamba", False), ("Bloom", False), ("Qwen3Next", False),
    ],
)  # fmt: skip
def test_which_models_keep_documents_apart(kind: str, apart: bool) -> None:
    config = getattr(transformers, f"{kind}Config")()
    with torch.device("meta"):
        model = getattr(transformers, f"{kind}LMHeadModel" if kind == "GPT2" else f"{kind}ForCausalLM")
        why = why_documents_mix(model._from_config(config))
    assert (why == "") is apart, why


@pytest.mark.parametrize(
    ("kind", "attention"),
    [(kind, how) for kind in ("Mistral", "Qwen2", "Qwen3", "Phi3") for how in ("eager", "sdpa")]
    + [("Gemma2", "eager")],
)
def test_models_that_are_said_to_keep_documents_apart_do(kind: str, attention: str) -> None:
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=28, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, pad_token_id=0, eos_token_id=1, bos_token_id=1,
        attn_implementation=attention,
    )  # fmt: skip
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    assert not why_documents_mix(model)
    first, second = torch.randint(2, 28, (1, 5)), torch.randint(2, 28, (1, 7))
    positions = torch.cat([torch.arange(5), torch.arange(7)])[None]
    with torch.no_grad():
        together = model(input_ids=torch.cat([first, second], 1), position_ids=positions, use_cache=False).logits
        alone = torch.cat([model(input_ids=tokens, use_cache=False).logits for tokens in (first, second)], 1)
    torch.testing.assert_close(together, alone)
    assert float(alone.std()) > 1e-3
