"""TRL's supervised trainer, one example per row: what is counted, named and divided, against autograd."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

trl = pytest.importorskip("trl")

from datasets import Dataset  # noqa: E402

from tests.support import support  # noqa: E402

TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ message['content'] + ' ' }}{% else %}"
    "{% generation %}{{ message['content'] + ' ' + eos_token }}{% endgeneration %}{{ ' ' }}{% endif %}{% endfor %}"
)


@pytest.fixture
def sft(settings: Callable, trained: Callable, tokenizer: Any) -> Callable[..., Any]:
    """Trains a model on rows by the SFTTrainer."""

    def run(model: Any, rows: list[dict[str, Any]], **changes: Any) -> Any:
        return trained(
            lambda callbacks: trl.SFTTrainer(
                model, args=trl.SFTConfig(**settings(**changes)), train_dataset=Dataset.from_list(rows),
                processing_class=tokenizer, callbacks=callbacks,
            ),
        )  # fmt: skip

    return run


@pytest.fixture
def completions(words: Callable) -> list[dict[str, str]]:
    """Six prompts with completions of their own length."""
    return [{"id": f"row-{i}", "source": "made", "prompt": words(5), "completion": " " + words(6)} for i in range(6)]


def _tokens(row: dict[str, str], tokenizer: Any) -> tuple[list[int], int]:
    """Tokens of prompt and completion, and where the completion starts."""
    tokens = tokenizer(row["prompt"] + row["completion"])["input_ids"] + [tokenizer.eos_token_id]
    return tokens, len(row["prompt"].split())


@support("TRL", "SFTTrainer, completion-only loss")
@pytest.mark.parametrize("only", [True, False], ids=["completions", "whole texts"])
def test_a_row_is_the_gradient_of_the_tokens_that_count(
    only: bool, completions: list[dict[str, str]], sft: Callable, tiny_gpt2: Callable, tokenizer: Any, close: Callable
) -> None:
    """Ids from the column. The denominator is that of the whole accumulated batch, measured from the fused head:
    ``Trainer`` counts the first tokens of whole texts too where the model is a GPT-2, which predicts none of them.
    """
    run = sft(tiny_gpt2(0), completions, completion_only_loss=only, per_device_train_batch_size=3)
    rows = {row["id"]: _tokens(row, tokenizer) for row in completions}
    counts = {name: len(tokens) - (start if only else 1) for name, (tokens, start) in rows.items()}
    assert sorted(row["example"] for row in run.table) == sorted(rows)
    assert {row["example"]: row["tokens"] for row in run.table} == counts
    assert {row["denominator_source"] for row in run.table} == {"measured"}
    counted = sum(counts.values()) + (0 if only else len(rows))
    assert [row["denominator"] for row in run.table] == pytest.approx([counted] * 6, rel=1e-4)
    assert {row["source"] for row in run.stage.examples().to_pylist()} == {"made"}
    for row, sketch in zip(run.table, run.sketches, strict=True):
        tokens, start = rows[row["example"]]
        assert run.texts[row["example"]] == tokenizer.decode(tokens, skip_special_tokens=True)
        close(sketch, run.gradient(lambda t=tokens, s=start: -run.likelihood(t, s if only else 1)), relative=1e-4)


@support("TRL", "SFTTrainer, assistant-only loss")
def test_only_the_assistants_turns_count(
    words: Callable, sft: Callable, tiny_llama: Callable, tokenizer: Any, close: Callable
) -> None:
    tokenizer.chat_template = TEMPLATE
    turns = [[("user", words(4)), ("assistant", words(4))] * (1 + i % 2) for i in range(4)]
    rows = [{"id": str(i), "messages": [{"role": r, "content": c} for r, c in t]} for i, t in enumerate(turns)]
    run = sft(tiny_llama(), rows, assistant_only_loss=True)
    for row, sketch in zip(run.table, run.sketches, strict=True):
        tokens: list[int] = []
        labels: list[int] = []
        for role, content in turns[int(row["example"])]:
            turn = tokenizer(content)["input_ids"] + [tokenizer.eos_token_id] * (role == "assistant")
            tokens += turn
            labels += turn if role == "assistant" else [-100] * len(turn)
        assert row["tokens"] == sum(label != -100 for label in labels)

        def loss(tokens: list[int] = tokens, labels: list[int] = labels) -> torch.Tensor:
            logits = run.model(input_ids=torch.tensor([tokens])).logits[0, :-1]
            return F.cross_entropy(logits, torch.tensor(labels[1:]), reduction="sum")

        close(sketch, run.gradient(loss), relative=1e-5)


def _smoothed(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits, targets, label_smoothing=0.2, reduction="sum")


def _dft(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Wu et al. 2025, equation 9: each token weighted by its own probability, as a constant."""
    losses = F.cross_entropy(logits, targets, reduction="none")
    return (losses * (-losses).exp().detach()).sum()


@support("TRL", "SFTTrainer, loss_type dft and label smoothing")
@pytest.mark.parametrize(
    ("changes", "loss"),
    [({"label_smoothing_factor": 0.2}, _smoothed), ({"loss_type": "dft"}, _dft)],
    ids=["smoothed", "dft"],
)
def test_a_loss_that_cannot_be_measured_is_divided_by_the_trainers_count(
    changes: dict[str, Any], loss: Callable, completions: list[dict[str, str]], sft: Callable, tiny_llama: Callable,
    tokenizer: Any, close: Callable,
) -> None:  # fmt: skip
    run = sft(tiny_llama(), completions, completion_only_loss=True, **changes)
    rows = {row["id"]: _tokens(row, tokenizer) for row in completions}
    total = sum(len(tokens) - start for tokens, start in (rows[row["example"]] for row in run.table))
    assert {(row["denominator"], row["denominator_source"]) for row in run.table} == {(total, "given")}
    for row, sketch in zip(run.table, run.sketches, strict=True):
        tokens, start = rows[row["example"]]

        def own_loss(tokens: list[int] = tokens, start: int = start) -> torch.Tensor:
            logits = run.model(input_ids=torch.tensor([tokens])).logits
            return loss(logits[0, start - 1 : -1], torch.tensor(tokens[start:]))

        close(sketch, run.gradient(own_loss), relative=1e-5)
