"""Trainers driven from outside: the weights that train() gives, bit for bit; thinned steps; what is refused."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

transformers = pytest.importorskip("transformers")
trl = pytest.importorskip("trl")

from datasets import Dataset, IterableDataset  # noqa: E402

from trainer_attrib.analysis.programs import Step, Steps, steps_of  # noqa: E402
from trainer_attrib.errors import ConfigurationError  # noqa: E402

ROWS, BATCH = 11, 2


@pytest.fixture
def trainer_of(tmp_path: Path, token_rows: Callable, pad_collator: Callable, tiny_gpt2: Callable) -> Callable[..., Any]:
    """Makes Trainers of a tiny GPT-2: 11 rows in batches of 2, accumulated by 4: an epoch's last step is short."""

    def make(model: Any = None, data: Any = None, trainer: type = transformers.Trainer, **changes: Any) -> Any:
        settings = {
            "output_dir": str(tmp_path / "output"), "num_train_epochs": 3, "per_device_train_batch_size": BATCH,
            "gradient_accumulation_steps": 4, "learning_rate": 1e-2, "max_grad_norm": 0.1, "warmup_steps": 2,
            "save_strategy": "no", "report_to": [], "use_cpu": True, "disable_tqdm": True,
        }  # fmt: skip
        given = {name: changes.pop(name) for name in ("optimizers", "compute_loss_func") if name in changes}
        return trainer(
            model=tiny_gpt2(dropout=0.2) if model is None else model,
            args=transformers.TrainingArguments(**settings | changes),
            train_dataset=token_rows(ROWS) if data is None else data,
            data_collator=pad_collator(),
            **given,
        )

    return make


def drive(trainer: Any, count: int) -> list[Step]:
    """Train as the analyzer would, with the trainer's own schedule."""
    steps = steps_of(trainer)
    assert isinstance(steps, Steps)
    optimizer = steps.optimizer()
    schedule = trainer.create_scheduler(num_training_steps=count, optimizer=optimizer)
    taken = list(itertools.islice(_driven(steps, optimizer, schedule), count))
    assert len(taken) == count
    return taken


def _driven(steps: Steps, optimizer: Any, schedule: Any) -> Iterator[Step]:
    for step in steps.steps():
        optimizer.zero_grad()
        for loss in step.losses:
            loss().backward()
        steps.clip()
        optimizer.step()
        schedule.step()
        yield step


def check_equal(make: Callable[[], Any]) -> list[Step]:
    """Driving gives train()'s weights and leaves train()'s random state."""
    ended = {}
    for way in ("train", "drive"):
        trainer = make()
        torch.manual_seed(5)
        initial = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
        if way == "train":
            trainer.train()
            count = trainer.state.global_step
        else:
            taken = drive(trainer, count)
        ended[way] = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
        ended[way]["random state"] = torch.get_rng_state()
    assert any(not torch.equal(value, initial[name]) for name, value in ended["train"].items() if name in initial)
    for name, value in ended["train"].items():
        assert torch.equal(value, ended["drive"][name]), name
    return taken


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({}, id="adamw"),
        pytest.param({"optim": "sgd", "lr_scheduler_type": "constant"}, id="sgd"),
        pytest.param({"bf16": True}, id="bf16"),
        pytest.param({"max_grad_norm": 0.0, "gradient_accumulation_steps": 1, "max_steps": 8}, id="no clipping"),
        pytest.param({"label_smoothing_factor": 0.1, "dataloader_drop_last": True}, id="label smoothing"),
        pytest.param({"train_sampling_strategy": "group_by_length", "optim": "adafactor"}, id="grouped by length"),
    ],
)
def test_driving_gives_the_weights_of_training(settings: dict[str, Any], trainer_of: Callable) -> None:
    steps = check_equal(lambda: trainer_of(**settings))
    assert {step.share for step in steps} == {1.0}
    if not settings:
        assert [len(step.losses) for step in steps] == [4, 2] * 3


def test_losses_of_ones_own_are_divided_as_in_training(trainer_of: Callable) -> None:
    """A mean over each micro-batch, which the Trainer divides by their number, fewer in an epoch's last step."""

    class Own(transformers.Trainer):
        loss_is_scaled_for_ga = False

        def compute_loss(self, model: Any, inputs: Any, num_items_in_batch: Any = None, **kwargs: Any) -> Any:
            weight = 1 + self.state.global_step + self.state.epoch + self.state.max_steps
            return weight * model(**inputs).loss.sin()

    check_equal(lambda: trainer_of(trainer=Own))


def test_an_optimizer_of_ones_own_is_made_anew(trainer_of: Callable, tiny_gpt2: Callable) -> None:
    def make() -> Any:
        model = tiny_gpt2(dropout=0.1)
        groups = [{"params": [p], "lr": 0.01 / i} for i, p in enumerate(model.parameters(), start=1)]
        optimizer = torch.optim.SGD(groups, momentum=0.9)
        return trainer_of(model, optimizers=(optimizer, None))

    trainer = make()
    check_equal(make)
    drive(trainer, 3)
    assert not trainer.optimizer.state
    assert trainer.optimizer.param_groups[1]["lr"] == 0.005


def test_a_stream_that_ends_in_mid_step(trainer_of: Callable, token_rows: Callable, tiny_gpt2: Callable) -> None:
    """The Trainer takes no step there and adds the next epoch's gradients."""
    steps = check_equal(
        lambda: trainer_of(
            tiny_gpt2(),
            data=IterableDataset.from_generator(lambda: iter(token_rows(ROWS))),
            max_steps=3,
            warmup_steps=0,
        )
    )
    assert [len(step.losses) for step in steps] == [4, 6, 6]


@pytest.mark.parametrize("padding_free", [False, True])
def test_sft(padding_free: bool, tmp_path: Path, tiny_llama: Callable, tokenizer: Any, words: Callable,
             settings: Callable) -> None:  # fmt: skip
    texts = Dataset.from_list([{"text": words(9)} for _ in range(7)])
    arguments = settings(max_steps=5, padding_free=padding_free)
    if padding_free:
        arguments |= {"max_length": None}

    def make() -> Any:
        args = trl.SFTConfig(**arguments)
        return trl.SFTTrainer(tiny_llama(attention_dropout=0.1), args=args, train_dataset=texts,
                              processing_class=tokenizer)  # fmt: skip

    steps = check_equal(make)
    assert [len(step.losses) for step in steps] == [2, 2, 2, 2, 2]
    assert not make()._metrics["train"]
    thinned = next(iter(steps_of(make()).steps(4)))
    assert (len(thinned.losses), thinned.share) == (1, 0.25)
    assert torch.isfinite(thinned.losses[0]())


def test_dpo_with_a_reference_model(tiny_llama: Callable, tokenizer: Any, words: Callable, settings: Callable) -> None:
    pairs = Dataset.from_list(
        [{"prompt": words(5), "chosen": " " + words(6), "rejected": " " + words(6)} for _ in range(6)]
    )
    arguments = settings(max_steps=4, beta=0.5, max_length=32)

    def make() -> Any:
        return trl.DPOTrainer(tiny_llama(0), ref_model=tiny_llama(1), args=trl.DPOConfig(**arguments),
                              train_dataset=pairs, processing_class=tokenizer)  # fmt: skip

    trainer = make()
    steps = check_equal(make)
    assert [len(step.losses) for step in steps] == [2, 1, 2, 1]
    thinned = list(itertools.islice(steps_of(trainer).steps(2), 2))
    assert [(len(step.losses), step.share) for step in thinned] == [(1, 0.5), (1, 1.0)]
    assert torch.isfinite(thinned[0].losses[0]())


def test_kto_and_rewards(tiny_llama: Callable, tokenizer: Any, words: Callable, settings: Callable) -> None:
    pairs = [{"prompt": words(5), "chosen": " " + words(6), "rejected": " " + words(6)} for _ in range(6)]
    single = [{"prompt": p["prompt"], "completion": p["chosen"], "label": i % 2 == 0} for i, p in enumerate(pairs)]
    arguments = settings(max_steps=4, max_length=32)

    def kto() -> Any:
        return trl.KTOTrainer(tiny_llama(0), ref_model=tiny_llama(1), args=trl.KTOConfig(**arguments),
                              train_dataset=Dataset.from_list(single), processing_class=tokenizer)  # fmt: skip

    def reward() -> Any:
        model = tiny_llama(0, kind="LlamaForSequenceClassification", num_labels=1)
        return trl.RewardTrainer(model, args=trl.RewardConfig(**arguments), train_dataset=Dataset.from_list(pairs),
                                 processing_class=tokenizer)  # fmt: skip

    for make in (kto, reward):
        check_equal(make)
        step = next(iter(steps_of(make()).steps(4)))
        assert (len(step.losses), step.share) == (1, 0.25)
        assert torch.isfinite(step.losses[0]())


def test_trls_fused_head_has_no_second_derivative(
    tiny_llama: Callable, tokenizer: Any, words: Callable, settings: Callable
) -> None:
    """It says so, instead of giving a wrong one."""
    texts = Dataset.from_list([{"text": words(9)} for _ in range(4)])
    trainer = trl.SFTTrainer(tiny_llama(), args=trl.SFTConfig(**settings()), train_dataset=texts,
                             processing_class=tokenizer)  # fmt: skip
    loss = next(iter(steps_of(trainer).steps())).losses[0]
    with sdpa_kernel(SDPBackend.MATH), pytest.raises(RuntimeError, match="automatic differentiation"):
        torch.autograd.grad(loss(), list(trainer.model.parameters()), create_graph=True)


def test_grpo_makes_its_rollouts_once(tiny_llama: Callable, tokenizer: Any, words: Callable, settings: Callable
                                      ) -> None:  # fmt: skip
    prompts = Dataset.from_list([{"prompt": words(5)} for _ in range(4)])
    arguments = settings(max_steps=4, num_generations=2, max_completion_length=4, num_iterations=2, learning_rate=1e-2)

    def reward(completions: list[str], **kwargs: Any) -> list[float]:
        return [float(len(set(text))) for text in completions]

    def make() -> Any:
        return trl.GRPOTrainer(tiny_llama(), reward_funcs=reward, args=trl.GRPOConfig(**arguments),
                               train_dataset=prompts, processing_class=tokenizer)  # fmt: skip

    check_equal(make)
    step = next(iter(steps_of(make()).steps(thin=4)))
    assert step.share == 1.0
    first = [loss().item() for loss in step.losses]
    assert [loss().item() for loss in step.losses] == first


def test_a_loss_can_be_computed_again_and_differentiated_twice(trainer_of: Callable, tiny_gpt2: Callable) -> None:
    """Twice needs an attention kernel that has a second derivative."""
    trainer = trainer_of(tiny_gpt2())
    steps = steps_of(trainer)
    loss = next(iter(steps.steps())).losses[1]
    assert loss().item() == loss().item()
    weights = list(trainer.model.parameters())
    with sdpa_kernel(SDPBackend.MATH):
        gradient = torch.autograd.grad(loss(), weights, create_graph=True)
        flat = torch.cat([g.flatten() for g in gradient])
        second = torch.autograd.grad(flat @ flat.detach(), weights)
    assert float(torch.cat([s.flatten() for s in second]).norm()) > 0
    with torch.no_grad():
        before = loss().item()
        trainer.model.lm_head.weight.mul_(1.5)
        assert loss().item() != before


@pytest.mark.parametrize(("thin", "accumulate", "losses"), [(2, 1, 1), (2, 4, 2), (4, 4, 1), (8, 4, 1), (50, 1, 1)])
def test_thinned_steps_are_means_over_what_is_kept(
    thin: int, accumulate: int, losses: int, float64: None, trainer_of: Callable, tiny_gpt2: Callable,
    token_rows: Callable, pad_collator: Callable,
) -> None:  # fmt: skip
    """Counting the target tokens of the kept examples only; over the epochs, all examples are kept."""
    model = tiny_gpt2().double()
    data = token_rows(8)
    sizes = {"per_device_train_batch_size": 2 if accumulate == 4 else 4, "gradient_accumulation_steps": accumulate}
    trainer = trainer_of(model, data, train_sampling_strategy="sequential", **sizes)
    names = {tuple(row["input_ids"]): i for i, row in enumerate(data)}
    seen: set[int] = set()
    for step in itertools.islice(steps_of(trainer).steps(thin), 16):
        rows = [
            tuple(row[mask.bool()].tolist())
            for loss in step.losses
            for row, mask in zip(loss._batch["input_ids"], loss._batch["attention_mask"], strict=True)
        ]
        kept = [names[row] for row in rows]
        seen |= set(kept)
        assert len(step.losses) == losses
        assert step.share == len(kept) / (2 * 4 if accumulate == 4 else 4)
        assert len(kept) >= 1
        found = torch.autograd.grad(sum(loss() for loss in step.losses), list(model.parameters()))
        batch = pad_collator()([data[i] for i in kept])
        count = sum(len(data[i]["input_ids"]) - (0 if not trainer._loss_shifts_labels else 1) for i in kept)
        summed = model(**batch, num_items_in_batch=torch.tensor(float(count))).loss
        expected = torch.autograd.grad(summed, list(model.parameters()))
        for mine, theirs in zip(found, expected, strict=True):
            assert torch.allclose(mine, theirs, rtol=1e-9, atol=1e-13)
    assert seen == set(range(8))


def test_loader_workers_thin_too(trainer_of: Callable) -> None:
    trainer = trainer_of(dataloader_num_workers=2, gradient_accumulation_steps=1, per_device_train_batch_size=4)
    shares = [step.share for step in itertools.islice(steps_of(trainer).steps(3), 3)]
    assert shares == [2 / 4, 2 / 4, 1 / 3]


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"torch_compile": True}, "compiled"),
        ({"neftune_noise_alpha": 1.0}, "NEFTune"),
        ({"use_liger_kernel": True}, "fused kernel"),
    ],
)
def test_what_cannot_be_driven_is_refused(settings: dict[str, Any], reason: str, trainer_of: Callable) -> None:
    trainer = trainer_of()
    for name, value in settings.items():
        setattr(trainer.args if name != "neftune_noise_alpha" else trainer, name, value)
    with pytest.raises(ConfigurationError, match=reason):
        steps_of(trainer)


def test_fp16_is_refused(trainer_of: Callable) -> None:
    trainer = trainer_of()
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu")
    with pytest.raises(ConfigurationError, match="fp16"):
        steps_of(trainer)


def test_a_training_step_that_takes_gradients_itself(trainer_of: Callable) -> None:
    class Own(transformers.Trainer):
        def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
            loss = model(**inputs).loss
            loss.backward()
            return loss.detach()

    step = next(iter(steps_of(trainer_of(trainer=Own)).steps()))
    with pytest.raises(ConfigurationError, match="0 times"):
        step.losses[0]()


@pytest.mark.parametrize("thin", [0, -1, 1.5])
def test_thin_must_be_a_whole_number(thin: Any, trainer_of: Callable) -> None:
    with pytest.raises(ConfigurationError, match="whole number"):
        next(iter(steps_of(trainer_of()).steps(thin)))
