"""Forecasts of Trainers: training afterwards gives the same bits; plans do to losses what they say."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

transformers = pytest.importorskip("transformers")
trl = pytest.importorskip("trl")

from datasets import Dataset, IterableDataset, load_from_disk  # noqa: E402

from tests.support import support  # noqa: E402
from trainer_attrib import Behavior  # noqa: E402
from trainer_attrib.analysis.forecasting.plan import Plan  # noqa: E402
from trainer_attrib.analysis.programs import steps_of  # noqa: E402
from trainer_attrib.analysis.rates import Generations  # noqa: E402
from trainer_attrib.errors import ConfigurationError, MissingDataError  # noqa: E402
from trainer_attrib.integrations.huggingface import AttributionCallback, apply_plan, forecast  # noqa: E402
from trainer_attrib.tap.names import parameters_by_name  # noqa: E402

BETA = 0.5


@pytest.fixture
def pairs(words: Callable) -> list[dict[str, str]]:
    return [
        {"id": f"p{i}", "source": "ab"[i % 2], "prompt": words(5), "chosen": " " + words(6), "rejected": " " + words(6)}
        for i in range(8)
    ]


@pytest.fixture
def dpo(settings: Callable, tokenizer: Any, pairs: Any, tiny_llama: Callable) -> Callable[..., Any]:
    """Makes DPOTrainers of the pairs that have not trained; the reference is the first model."""

    def make(data: Any = None, callbacks: Any = (), loss: type = trl.DPOTrainer, **changes: Any) -> Any:
        arguments = settings(**{
            "beta": BETA, "max_length": 32, "max_steps": 4, "learning_rate": 2e-3, "warmup_steps": 1,
            "gradient_accumulation_steps": 1, "max_grad_norm": 1.0, **changes,
        })  # fmt: skip
        return loss(
            tiny_llama(0), ref_model=tiny_llama(0), args=trl.DPOConfig(**arguments),
            train_dataset=data if data is not None else Dataset.from_list(pairs), processing_class=tokenizer,
            callbacks=list(callbacks),
        )  # fmt: skip

    return make


def weights_of(trainer: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in parameters_by_name(trainer.model).items()}


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def words_of(tokenizer: Any, pairs: Any) -> tuple[list[Behavior], Behavior]:
    said = Generations([pair["prompt"] for pair in pairs[:4]], tokenizer, per_prompt=20, max_new_tokens=4)
    prompts, chosen, rejected = ([pair[key] for pair in pairs] for key in ("prompt", "chosen", "rejected"))
    rates = [
        Behavior.rate("w1", said, r"\bw1"),
        Behavior.rate(
            "w2, first prompts", said, lambda prompt, text: "w2" in text, where=lambda p: p == said.prompts[0]
        ),
    ]
    return rates, Behavior.contrast("prefers chosen", prompts, chosen, rejected, tokenizer)


def check_undisturbed(make: Callable[[], Any], look: Callable[[Any], Any]) -> Any:
    """Training after a look gives the bits of training without one; returns what was seen."""
    ended, seen = [], None
    for looks in (False, True):
        trainer = make()
        torch.manual_seed(7)
        before, grads = weights_of(trainer), [p.grad for p in trainer.model.parameters()]
        modes = [module.training for module in trainer.model.modules()]
        if looks:
            seen = look(trainer)
            assert same(weights_of(trainer), before)
            assert [p.grad for p in trainer.model.parameters()] == grads
            assert [module.training for module in trainer.model.modules()] == modes
            assert trainer.state.global_step == 0
            assert not trainer.model._forward_hooks
            assert not trainer.model._forward_pre_hooks
        trainer.train()
        ended.append((weights_of(trainer), torch.get_rng_state(), trainer.state.log_history[-1].get("train_loss")))
    assert same(ended[0][0], ended[1][0])
    assert torch.equal(ended[0][1], ended[1][1])
    assert ended[0][2] == ended[1][2]
    return seen


@support("Forecasts", "DPOTrainer: every method, contributions, reshaping; training afterwards is bit-identical")
def test_dpo(dpo: Callable, tokenizer: Any, pairs: Any) -> None:
    rates, prefers = words_of(tokenizer, pairs)

    def look(trainer: Any) -> Any:
        found = forecast(trainer, rates, ["frozen", "warm", "linearised", "look_ahead", "gradient", "counts",
                                          "projection"])  # fmt: skip
        told = found.contributions(["w1"])
        measured = forecast(trainer, [prefers], share=0.5)
        return found, told, measured, measured.reshape(keep_below={"prefers chosen": 0.0}, how="drop")

    found, told, measured, done = check_undisturbed(dpo, look)
    assert len(found.rows) == 14
    assert told.rows[0].id == "p0"
    assert told.rows[1].source == "b"
    assert told.rows[0].chosen.split() == pairs[0]["chosen"].split()
    assert measured.rows[0].predicted > 0, "DPO makes the model prefer what it is told to"
    assert measured.rows[0].cost == 0.5
    assert 0 < done.plan.dropped.sum() <= 8


def test_the_forecast_is_what_training_does(dpo: Callable, tokenizer: Any, pairs: Any) -> None:
    _, prefers = words_of(tokenizer, pairs)
    trainer = dpo(learning_rate=1e-4, max_steps=6)
    prompts, chosen, rejected = ([pair[key] for pair in pairs] for key in ("prompt", "chosen", "rejected"))
    accuracy = Behavior.accuracy("pairs", prompts, chosen, rejected, tokenizer)
    before_accuracy = accuracy.values(trainer.model).mean()
    assert before_accuracy == (prefers.values(trainer.model) > 0).double().mean()
    before = prefers.values(trainer.model).mean()
    methods = ["frozen", "linearised", "warm", "gradient", "look_ahead"]
    found = {row.method: row.predicted for row in forecast(trainer, [prefers], methods).rows}
    trainer.train()
    actual = float(prefers.values(trainer.model).mean() - before)
    assert found["frozen"] == pytest.approx(actual, rel=0.05)
    assert accuracy.values(trainer.model).mean() >= before_accuracy
    assert found["linearised"] == pytest.approx(actual, rel=0.05)
    assert found["warm"] == pytest.approx(actual, rel=0.4)
    assert found["gradient"] == pytest.approx(found["warm"], rel=0.1)
    assert found["look_ahead"] == pytest.approx(actual, rel=0.5)


@pytest.mark.parametrize("kind", ["dropout and accumulation", "own optimizer", "lora"])
def test_trainers_of_many_kinds_are_left_as_they_are(
    kind: str, dpo: Callable, tokenizer: Any, pairs: Any, tiny_llama: Callable, settings: Callable
) -> None:
    _, prefers = words_of(tokenizer, pairs)

    def make() -> Any:
        arguments = settings(beta=BETA, max_length=32, max_steps=3, learning_rate=1e-3)
        model, extra = tiny_llama(0, attention_dropout=0.2), {"ref_model": tiny_llama(1)}
        if kind == "own optimizer":
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5)
            extra["optimizers"] = (optimizer, torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5))
        if kind == "lora":
            peft = pytest.importorskip("peft")
            extra = {"peft_config": peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")}
            torch.manual_seed(0)
        return trl.DPOTrainer(
            model, args=trl.DPOConfig(**arguments), train_dataset=Dataset.from_list(pairs), processing_class=tokenizer,
            **extra,
        )  # fmt: skip

    seen = check_undisturbed(make, lambda trainer: forecast(trainer, [prefers]))
    assert seen.rows[0].predicted != 0


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param("plain", marks=support("Forecasts", "transformers.Trainer")),
        pytest.param("sft", marks=support("Forecasts", "SFTTrainer")),
        pytest.param("reward", marks=support("Forecasts", "RewardTrainer")),
        pytest.param("kto", marks=support("Forecasts", "KTOTrainer")),
    ],
)
def test_other_losses(
    kind: str, tiny_llama: Callable, tiny_gpt2: Callable, tokenizer: Any, pairs: Any, settings: Callable,
    token_rows: Callable, pad_collator: Callable,
) -> None:  # fmt: skip
    arguments = settings(max_steps=4, learning_rate=1e-3, gradient_accumulation_steps=1)
    _, prefers = words_of(tokenizer, pairs)

    def make() -> Any:
        model: Any = tiny_llama(0)
        if kind == "plain":
            return transformers.Trainer(
                tiny_gpt2(), transformers.TrainingArguments(**arguments), train_dataset=token_rows(9),
                data_collator=pad_collator(), processing_class=tokenizer,
            )  # fmt: skip
        if kind == "sft":
            texts = Dataset.from_list([{"text": p["prompt"] + p["chosen"], "id": p["id"]} for p in pairs])
            return trl.SFTTrainer(model, args=trl.SFTConfig(**arguments), train_dataset=texts,
                                  processing_class=tokenizer)  # fmt: skip
        if kind == "reward":
            model = tiny_llama(0, "LlamaForSequenceClassification", num_labels=1)
            return trl.RewardTrainer(model, args=trl.RewardConfig(**arguments, max_length=32),
                                     train_dataset=Dataset.from_list(pairs), processing_class=tokenizer)  # fmt: skip
        rows = [{"prompt": p["prompt"], "completion": p["chosen"], "label": i % 2 == 0} for i, p in enumerate(pairs)]
        from trl import KTOConfig, KTOTrainer

        return KTOTrainer(model, ref_model=tiny_llama(0), args=KTOConfig(**arguments, max_length=32),
                          train_dataset=Dataset.from_list(rows), processing_class=tokenizer)  # fmt: skip

    def look(trainer: Any) -> Any:
        behavior = prefers
        if kind == "reward":
            tokens = [torch.tensor(tokenizer(p["chosen"])["input_ids"][:2] * 2)[:3] for p in pairs]
            behavior = Behavior("score", tokens, lambda m, items: m(torch.stack(items)).logits[:, 0])
        found = forecast(trainer, [behavior], ["frozen", "gradient"])
        return found, found.contributions()

    found, told = check_undisturbed(make, look)
    assert found.rows[0].predicted != 0
    if kind != "kto":  # whose examples depend on each other through the KL estimate
        rows = {row.method: row for row in found.rows}
        assert np.sign(told.values.sum()) == np.sign(rows["gradient"].predicted) or abs(told.values.sum()) < 1e-4


def batch_losses(trainer: Any, plan: Any) -> list[torch.Tensor]:
    """Gradients of the trainer's first batches under a plan."""
    followed = apply_plan(trainer, plan)
    found = []
    try:
        for _, step in zip(range(2), steps_of(trainer).steps(), strict=False):  # type: ignore[union-attr]
            trainer.model.zero_grad()
            for loss in step.losses:
                loss().backward()
            found.append(torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None]))
    finally:
        followed.remove()
    trainer.model.zero_grad()
    return found


def test_weights_multiply_each_pairs_loss(dpo: Callable, pairs: Any) -> None:
    trainer = dpo(per_device_train_batch_size=8)
    ids = [pair["id"] for pair in pairs]
    plain, *_ = batch_losses(trainer, Plan.keeping(ids))
    single = []
    for number in range(8):
        weights = np.full(8, 1e-9)
        weights[number] = 1.0
        single.append(batch_losses(trainer, Plan.keeping(ids, weights=weights))[0])
    assert torch.allclose(sum(single), plain, atol=1e-6)  # type: ignore[arg-type]
    weights = np.linspace(0.25, 2.0, 8)
    found, *_ = batch_losses(trainer, Plan.keeping(ids, weights=weights))
    expected = sum(float(w) * one for w, one in zip(weights, single, strict=True))
    assert torch.allclose(found, expected, atol=1e-6)  # type: ignore[arg-type]
    assert torch.allclose(batch_losses(trainer, Plan.keeping(ids))[0], plain), "removed again"


def test_weights_of_texts(tiny_llama: Callable, tokenizer: Any, pairs: Any, settings: Callable) -> None:
    """TRL's SFT loss is computed from log-probabilities, so that texts can be weighed too."""
    texts = Dataset.from_list([{"id": pair["id"], "text": pair["prompt"] + pair["chosen"]} for pair in pairs])
    arguments = settings(per_device_train_batch_size=8, gradient_accumulation_steps=1, max_steps=2)
    trainer = trl.SFTTrainer(tiny_llama(0), args=trl.SFTConfig(**arguments), train_dataset=texts,
                             processing_class=tokenizer)  # fmt: skip
    ids = [pair["id"] for pair in pairs]
    plain, *_ = batch_losses(trainer, Plan.keeping(ids))
    halved, *_ = batch_losses(trainer, Plan.keeping(ids, weights=np.full(8, 0.5)))
    assert torch.allclose(halved, 0.5 * plain, atol=1e-7)


def test_a_plan_knows_its_rows_by_name(dpo: Callable, pairs: Any) -> None:
    trainer = dpo(per_device_train_batch_size=8)
    ids, weights = [pair["id"] for pair in pairs], np.linspace(0.25, 2.0, 8)
    expected, *_ = batch_losses(trainer, Plan.keeping(ids, weights=weights))
    found, *_ = batch_losses(trainer, Plan.keeping(ids[::-1], weights=weights[::-1]))
    assert torch.equal(found, expected)


def test_flips_turn_the_gradient_around_and_offsets_weigh(dpo: Callable, pairs: Any) -> None:
    """At the first step margins are 0, so that a pair pushes by sigma(-offset)."""
    trainer = dpo(per_device_train_batch_size=8)
    ids = [pair["id"] for pair in pairs]
    plain, *_ = batch_losses(trainer, Plan.keeping(ids))
    turned, *_ = batch_losses(trainer, Plan.keeping(ids, flipped=np.ones(8, bool)))
    assert torch.allclose(turned, -plain, atol=1e-6)
    offset, *_ = batch_losses(trainer, Plan.keeping(ids, offsets=np.full(8, 1.5)))
    assert torch.allclose(offset, 2 / (1 + np.exp(1.5)) * plain, atol=1e-6)


def test_masked_tokens_do_not_count(dpo: Callable, pairs: Any) -> None:
    trainer = dpo(per_device_train_batch_size=8)
    ids = [pair["id"] for pair in pairs]
    rows = list(trainer.train_dataset)
    everything = {
        number: (tuple(range(len(row["chosen_ids"]))), tuple(range(len(row["rejected_ids"]))))
        for number, row in enumerate(rows)
    }
    silent, *_ = batch_losses(trainer, Plan.keeping(ids, masked=everything))
    assert torch.all(silent == 0)
    half = {number: sides for number, sides in everything.items() if number != 3}
    alone, *_ = batch_losses(trainer, Plan.keeping(ids, masked=half))
    weights = np.full(8, 1e-9)
    weights[3] = 1.0
    assert torch.allclose(alone, batch_losses(trainer, Plan.keeping(ids, weights=weights))[0], atol=1e-6)


@pytest.mark.parametrize("how", ["reweight", "drop", "flip", "offset", "mask"])
def test_reshaped_training_does_what_the_forecast_says(how: str, dpo: Callable, tokenizer: Any, pairs: Any) -> None:
    _, prefers = words_of(tokenizer, pairs)
    changes: dict[str, Any] = {"learning_rate": 3e-4, "max_steps": 8, "num_train_epochs": 2}
    trainer = dpo(**changes)
    before = float(prefers.values(trainer.model).mean())
    found = forecast(trainer, [prefers])
    shift = found.rows[0].predicted
    done = found.reshape(keep_below={"prefers chosen": 0.4 * shift}, how=how)
    again = dpo(**changes)
    followed = apply_plan(again, done)
    again.train()
    followed.remove()
    actual = float(prefers.values(again.model).mean()) - before
    assert done.after.rows[0].predicted == pytest.approx(actual, abs=0.15 * shift)
    assert actual < 0.8 * shift or done.caveats, "what cannot be reached is said"
    assert not again.model._forward_hooks


def test_a_plan_in_the_columns_of_a_data_set(dpo: Callable, tokenizer: Any, pairs: Any, tmp_path: Any) -> None:
    _, prefers = words_of(tokenizer, pairs)
    trainer = dpo()
    found = forecast(trainer, [prefers])
    done = found.reshape(keep_below={"prefers chosen": 0.0})
    written = done.columns(Dataset.from_list(pairs))
    assert written["plan_weight"] == done.plan.weights.tolist()
    assert done.columns(pairs)[0]["plan_flip"] is False
    done.write(tmp_path / "planned", Dataset.from_list(pairs))
    assert load_from_disk(tmp_path / "planned")["plan_weight"][:] == written["plan_weight"][:]
    with pytest.raises(ConfigurationError, match="exists already"):
        done.write(tmp_path / "planned", pairs)
    both = []
    for how in ("plan", "columns"):
        again = dpo(written if how == "columns" else None)
        apply_plan(again, done if how == "plan" else None)
        again.train()
        both.append(weights_of(again))
    assert same(*both)
    with pytest.raises(ConfigurationError, match="no columns"):
        apply_plan(dpo())


def test_a_plan_and_a_recorder_go_together(dpo: Callable, pairs: Any, tmp_path: Any) -> None:
    from trainer_attrib import Ledger

    trainer = dpo(callbacks=[AttributionCallback(tmp_path / "ledger", stage="dpo", strict=True)])
    weights = np.linspace(0.25, 2.0, 8)
    apply_plan(trainer, Plan.keeping([pair["id"] for pair in pairs], weights=weights))
    trainer.train()
    stage = Ledger(tmp_path / "ledger").stage("dpo")
    assert set(stage.examples()["example"].to_pylist()) <= {pair["id"] for pair in pairs}
    assert stage.meta["status"] == "complete"


def test_what_is_refused(
    dpo: Callable, tokenizer: Any, pairs: Any, tiny_llama: Callable, tiny_gpt2: Callable, settings: Callable,
    token_rows: Callable, pad_collator: Callable,
) -> None:  # fmt: skip
    _, prefers = words_of(tokenizer, pairs)
    trainer = dpo()
    with pytest.raises(ConfigurationError, match="for 1 examples"):
        apply_plan(trainer, Plan.keeping(["a"]))
    ids = [pair["id"] for pair in pairs]
    with pytest.raises(ConfigurationError, match="every example"):
        apply_plan(trainer, Plan.keeping(ids, weights=np.zeros(8)))
    trained = dpo(max_steps=1)
    trained.train()
    with pytest.raises(ConfigurationError, match="has trained 1 steps"):
        forecast(trained, [prefers])
    rates, _ = words_of(tokenizer, pairs)
    with pytest.raises(ConfigurationError, match="baselines alone"):
        forecast(dpo(), rates, "counts").reshape(keep_below={"w1": 0.0})
    moved = dpo(max_steps=2)
    outlook = forecast(moved, [prefers])
    moved.train()
    with pytest.raises(ConfigurationError, match="other weights"):
        outlook.contributions()
    with pytest.raises(MissingDataError, match="not in the plan"):
        apply_plan(trainer, Plan.keeping([f"other {number}" for number in range(8)]))
    texts = Dataset.from_list([{"text": pair["chosen"]} for pair in pairs])
    sft = trl.SFTTrainer(tiny_llama(0), args=trl.SFTConfig(**settings()), train_dataset=texts,
                         processing_class=tokenizer)  # fmt: skip
    with pytest.raises(ConfigurationError, match="pairs"):
        apply_plan(sft, Plan.keeping(ids, flipped=np.ones(8, bool)))
    plain = transformers.Trainer(
        tiny_gpt2(), transformers.TrainingArguments(**settings(max_steps=3)),
        train_dataset=Dataset.from_list(token_rows(9)), data_collator=pad_collator(),
    )  # fmt: skip
    with pytest.raises(ConfigurationError, match="not computed from outputs"):
        forecast(plain, [prefers], "linearised")
    apply_plan(plain, Plan.keeping([str(i) for i in range(9)], weights=np.linspace(0.1, 1, 9)))
    with pytest.raises(ConfigurationError, match="not computed from outputs"):
        plain.train()


def test_a_stream_is_forecast_but_not_listed(
    tiny_llama: Callable, tokenizer: Any, pairs: Any, settings: Callable, words: Callable
) -> None:
    _, prefers = words_of(tokenizer, pairs)
    texts = IterableDataset.from_generator(lambda: ({"text": pair["prompt"] + pair["chosen"]} for pair in pairs))
    trainer = trl.SFTTrainer(
        tiny_llama(0), args=trl.SFTConfig(**settings(max_steps=2)), train_dataset=texts, processing_class=tokenizer
    )
    found = forecast(trainer, [prefers])
    assert found.rows[0].predicted != 0
    with pytest.raises(ConfigurationError, match="stream"):
        found.contributions()
