"""Shadows beside TRL's trainers: also the reference model is the one that there would have been."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

trl = pytest.importorskip("trl")
peft = pytest.importorskip("peft")

from datasets import Dataset  # noqa: E402

from tests.capture.test_shadow import assert_close, stage_of  # noqa: E402
from tests.support import support  # noqa: E402
from trainer_attrib import Shadow  # noqa: E402
from trainer_attrib.errors import ConfigurationError  # noqa: E402
from trainer_attrib.integrations.huggingface import AttributionCallback  # noqa: E402
from trainer_attrib.tap.names import parameters_by_name  # noqa: E402

LORA = peft.LoraConfig(r=3, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", lora_dropout=0.1)


def named(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in parameters_by_name(model).items()}


@pytest.fixture
def texts(words: Callable) -> Callable[[int], Dataset]:
    """Prompts with two completions each, of their own lengths."""

    def make(count: int) -> Dataset:
        return Dataset.from_list(
            [{"prompt": words(5), "chosen": " " + words(6), "rejected": " " + words(6)} for _ in range(count)]
        )

    return make


@pytest.fixture
def stages(tmp_path: Path, settings: Callable, tokenizer: Any, texts: Callable) -> Any:
    """Trains by SFT on whole texts, by DPO or a reward model, recorded where a stage is named."""
    data = {"a": texts(16), "b": texts(24)}
    data["same"] = data["a"].select([0] * 24)

    def callbacks(stage: str, *shadow: Shadow) -> list[Any]:
        ledger = tmp_path / "ledger"
        return [AttributionCallback(ledger, stage=stage, strict=True, shadow=shadow)] if stage else []

    def reward(model: Any, rows: str, stage: str = "", *shadow: Shadow) -> None:
        arguments = trl.RewardConfig(**settings(max_steps=6, learning_rate=1e-2, max_length=32))
        trl.RewardTrainer(
            model, args=arguments, train_dataset=data[rows], processing_class=tokenizer,
            callbacks=callbacks(stage, *shadow),
        ).train()  # fmt: skip

    def sft(model: Any, rows: str, stage: str = "", *shadow: Shadow, **changes: Any) -> Any:
        arguments = trl.SFTConfig(**settings(**{"max_steps": 6, "learning_rate": 1e-2, "max_length": 32, **changes}))
        plain = data[rows].map(lambda row: {"text": row["prompt"] + row["chosen"]})
        plain = plain.remove_columns(["prompt", "chosen", "rejected"])
        trainer = trl.SFTTrainer(
            model, arguments, train_dataset=plain, processing_class=tokenizer, callbacks=callbacks(stage, *shadow)
        )
        trainer.train()
        return trainer

    def dpo(model: Any, stage: str = "", *shadow: Shadow, options: Any = None, **changes: Any) -> Any:
        arguments = trl.DPOConfig(**settings(**{"max_steps": 6, "learning_rate": 1e-2, "max_length": 32, **changes}))
        trainer = trl.DPOTrainer(
            model, args=arguments, train_dataset=data["b"], processing_class=tokenizer,
            callbacks=callbacks(stage, *shadow), **(options or {}),
        )  # fmt: skip
        trainer.train()
        return trainer

    return {"sft": sft, "dpo": dpo, "reward": reward}


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        pytest.param("sft", {}, marks=support("Shadows", "SFTTrainer of TRL")),
        pytest.param("sft", {"packing": True}, marks=support("Shadows", "SFTTrainer of TRL, packed documents")),
        pytest.param("reward", {}, marks=support("Shadows", "RewardTrainer of TRL")),
    ],
)
def test_with_the_whole_batch_it_is_the_training_without_the_stage(
    kind: str, changes: dict[str, Any], stages: Any, tiny_llama: Callable, tmp_path: Path, float64: None
) -> None:
    """Tokens are counted over both micro-batches of a step, and gradients clipped."""
    model = tiny_llama(0) if kind == "sft" else tiny_llama(0, "LlamaForSequenceClassification", num_labels=1)
    other, train = copy.deepcopy(model), stages[kind]
    train(model, "a", "a", **changes)
    train(model, "b", "b", Shadow("a", thin=1), **changes)
    train(other, "b", **changes)
    assert_close(stage_of(tmp_path / "ledger", "b").shadow("a"), named(other))


def test_a_part_stands_for_the_tokens_of_its_micro_batch(
    stages: Any, tiny_llama: Callable, tmp_path: Path, float64: None
) -> None:
    """Where all examples are the same, half of them say it all; training and what it logs are as without."""
    sft = stages["sft"]
    model = tiny_llama(0)
    other = copy.deepcopy(model)
    sft(model, "a", "a")
    again = copy.deepcopy(model)
    plain = {"logging_steps": 1}
    logs = [sft(model, "same", "b", Shadow("a", thin=2), **plain), sft(again, "same", **plain)]
    sft(other, "same", **plain)
    stage = stage_of(tmp_path / "ledger", "b")
    assert_close(stage.shadow("a"), named(other), relative=1e-6)  # Llama's norms compute in float32
    assert stage.shadows()[0]["share"] == 0.5
    assert torch.equal(flat(named(model)), flat(named(again)))
    kept = ("loss", "entropy", "num_tokens", "mean_token_accuracy")
    first, second = ([[row.get(k) for k in kept] for row in trainer.state.log_history[:-1]] for trainer in logs)
    assert first == second
    assert len(first) == 6


def flat(weights: dict[str, Tensor]) -> Tensor:
    return torch.cat([weights[name].flatten() for name in sorted(weights)])


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param("model", marks=support("Shadows", "DPOTrainer of TRL, reference model given")),
        pytest.param("adapter", marks=support("Shadows", "DPOTrainer of TRL, LoRA without a reference model")),
    ],
)
def test_preferences(kind: str, stages: Any, tiny_llama: Callable, tmp_path: Path, float64: None) -> None:
    """Against a training without the first stage, whose reference is the untrained model as well."""
    sft, dpo = stages["sft"], stages["dpo"]
    model = tiny_llama(0)
    other = copy.deepcopy(model)
    sft(model, "a", "a")
    reference = [{"ref_model": copy.deepcopy(m)} if kind == "model" else {"peft_config": LORA} for m in (model, other)]
    trained = dpo(model, "b", Shadow("a", thin=1), options=reference[0]).model
    without = dpo(other, options=reference[1]).model
    shadow = stage_of(tmp_path / "ledger", "b").shadow("a")
    expected = named(without)
    assert_close(shadow, {name: expected[name] for name in shadow})
    assert len(shadow) > 10
    assert not torch.equal(flat(named(trained)), flat(expected))


@support("Shadows", "DPOTrainer of TRL, reference precomputed", refused=True)
def test_references_computed_beforehand_are_refused(stages: Any, tiny_llama: Callable) -> None:
    sft, dpo = stages["sft"], stages["dpo"]
    model = tiny_llama(0)
    sft(model, "a", "a")
    with pytest.raises(ConfigurationError, match="computed beforehand"):
        dpo(model, "b", Shadow("a"), options={"ref_model": copy.deepcopy(model)}, precompute_ref_log_probs=True)


@support("Shadows", "GRPOTrainer of TRL, and whoever trains on what the model generates", refused=True)
def test_rollouts_are_refused(
    tmp_path: Path, settings: Callable, tokenizer: Any, tiny_llama: Callable, texts: Callable
) -> None:
    trainer = trl.GRPOTrainer(
        tiny_llama(0), reward_funcs=lambda completion_ids, **columns: [0.0] * len(completion_ids),
        args=trl.GRPOConfig(**settings(num_generations=2, max_completion_length=4)), train_dataset=texts(4),
        processing_class=tokenizer,
        callbacks=[AttributionCallback(tmp_path / "ledger", stage="b", shadow=Shadow("a"))],
    )  # fmt: skip
    with pytest.raises(ConfigurationError, match="without the stage would generate others"):
        trainer.train()
