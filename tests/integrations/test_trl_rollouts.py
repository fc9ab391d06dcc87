"""Trainers that generate what they train on: a row is one rollout, whatever the loss and however often it is reused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

trl = pytest.importorskip("trl")

from datasets import Dataset  # noqa: E402

from tests.support import support  # noqa: E402

MEANS = {"grpo", "sapo", "dr_grpo"}  # these divide by the rows of a micro-batch, the others by tokens


def _reward(completion_ids: list[list[int]], **columns: Any) -> list[float]:
    """No two completions of a group should get the same."""
    return [float(sum((i + 1) * token for i, token in enumerate(tokens)) % 17) for tokens in completion_ids]


@pytest.fixture
def rollouts(settings: Callable, trained: Callable, tokenizer: Any, words: Callable) -> Callable[..., Any]:
    """Trains a model by a trainer that generates; its batches, as the loss saw them, are ``trainer.batches``."""

    def run(kind: str, model: Any, options: Any, **changes: Any) -> Any:
        data = Dataset.from_list([{"id": f"prompt-{i}", "prompt": words(5)} for i in range(8)])
        arguments = getattr(trl, f"{kind}Config")(**settings(max_completion_length=6, **changes))

        def make(callbacks: list[Any]) -> Any:
            trainer = getattr(trl, f"{kind}Trainer")(
                model, args=arguments, train_dataset=data, processing_class=tokenizer, callbacks=callbacks, **options
            )
            own, trainer.batches = trainer._compute_loss, []

            def noted(model: Any, inputs: dict[str, Any], *others: Any) -> Any:
                trainer.batches.append((inputs, others))
                return own(model, inputs, *others)

            trainer._compute_loss = noted
            return trainer

        return trained(make)

    return run


def _row(inputs: dict[str, Any], row: int) -> dict[str, Any]:
    """One row of a batch; what counts the whole batch stays."""
    return {
        name: value[row : row + 1] if isinstance(value, torch.Tensor) and value.dim() else value
        for name, value in inputs.items()
    }


def _check(run: Any, close: Callable, share: Callable[[dict[str, Any], int], float]) -> None:
    """Each row against the loss of its rollout alone, times its share in the micro-batch's loss."""
    batches = run.trainer.batches[:]
    compared = 0
    for row, sketch in zip(run.table, run.sketches, strict=True):
        inputs, others = batches[row["micro_batch"]]
        alone = _row(inputs, row["row"])

        def own_loss(alone: Any = alone, others: Any = others) -> torch.Tensor:
            found = run.trainer._compute_loss(run.model, alone, *others)
            return found[0] if isinstance(found, tuple) else found

        if row["norm"] == 0:
            continue  # an advantage of 0
        expected = run.gradient(own_loss) * share(inputs, row["row"]) * row["denominator"]
        close(sketch, expected, relative=1e-4)
        compared += 1
    assert compared >= 3


@support("TRL", "GRPOTrainer")
@pytest.mark.parametrize("loss", ["grpo", "dapo", "bnpo", "dr_grpo", "cispo", "sapo"])
def test_a_grpo_row_is_its_rollouts_part_of_the_loss(
    loss: str, rollouts: Callable, tiny_llama: Callable, close: Callable, tokenizer: Any
) -> None:
    options = {"reward_funcs": _reward}
    run = rollouts("GRPO", tiny_llama(), options, loss_type=loss, num_generations=2)
    assert (run.stage.meta["unit"], run.stage.meta["coupled_loss"]) == ("rollout", [])
    assert {(row["denominator"], row["denominator_source"]) for row in run.table} == {(4.0, "assumed mean")}

    def share(inputs: dict[str, Any], row: int) -> float:
        mask = inputs["completion_mask"]
        if loss == "bnpo":  # a mean over the micro-batch's tokens
            return float(mask[row].sum() / mask.sum())
        return 1 / len(mask) if loss in MEANS else 1.0

    _check(run, close, share)
    assert run.residual < 1e-5
    for row in run.table:
        inputs, _ = run.trainer.batches[row["micro_batch"]]
        kept = _row(inputs, row["row"])
        assert row["tokens"] == int(kept["completion_mask"].sum())
        parts = [kept[f"{part}_ids"][kept[f"{part}_mask"].bool()] for part in ("prompt", "completion")]
        assert run.texts[row["example"]] == tokenizer.decode(torch.cat(parts), skip_special_tokens=True)


@support("TRL", "GRPOTrainer, completions used several times (num_iterations, steps_per_generation)")
def test_reused_completions_keep_their_names(rollouts: Callable, tiny_llama: Callable) -> None:
    """Two iterations over a generation of four micro-batches, two of which make a step."""
    run = rollouts(
        "GRPO", tiny_llama(), {"reward_funcs": _reward}, num_generations=2, num_iterations=2, steps_per_generation=4,
        max_steps=4, temperature=0.9,
    )  # fmt: skip
    names = [[row["example"] for row in run.table if row["step"] == step] for step in (1, 2, 3, 4)]
    assert [len(each) for each in names] == [4, 4, 4, 4]
    assert (names[0], names[1]) == (names[2], names[3])
    assert len({*names[0], *names[1]}) == 8
    assert run.residual < 1e-5


@support("TRL", "GRPOTrainer")
def test_a_single_rollouts_advantage_is_not_taken_for_a_denominator(rollouts: Callable, tiny_llama: Callable) -> None:
    """Alone in its micro-batch, a rollout has the same gradient at each of its tokens, as a likelihood has."""
    run = rollouts(
        "GRPO", tiny_llama(), {"reward_funcs": _reward}, num_generations=2, per_device_train_batch_size=1,
        steps_per_generation=2,
    )  # fmt: skip
    assert {(row["denominator"], row["denominator_source"]) for row in run.table} == {(2.0, "assumed mean")}
    assert all(row["norm"] >= 0 for row in run.table)


def test_an_entropy_threshold_couples_rollouts(rollouts: Callable, tiny_llama: Callable, caplog: Any) -> None:
    run = rollouts("GRPO", tiny_llama(), {"reward_funcs": _reward}, num_generations=2, top_entropy_quantile=0.5)
    assert "entropies of the whole batch" in run.stage.meta["coupled_loss"][0]
    assert "coupled loss: which tokens count" in caplog.text


@support("TRL", "RLOOTrainer")
def test_an_rloo_row_is_its_rollouts_loss(rollouts: Callable, tiny_llama: Callable, close: Callable) -> None:
    """This trainer leaves the division by the accumulation steps to transformers."""
    run = rollouts("RLOO", tiny_llama(), {"reward_funcs": _reward}, num_generations=2, beta=0.0)
    assert run.stage.meta["unit"] == "rollout"
    _check(run, close, lambda inputs, row: 1 / (2 * len(inputs["advantages"])))
    assert run.residual < 1e-5


@support("TRL", "DistillationTrainer")
def test_a_distilled_row_is_its_rollouts_divergence(rollouts: Callable, tiny_llama: Callable, close: Callable) -> None:
    """Its loss is computed inside the model's forward, which gets the batch instead of tokens."""
    run = rollouts("Distillation", tiny_llama(0), {"teacher_model": tiny_llama(1)})
    assert run.stage.meta["unit"] == "rollout"
    assert len({row["example"] for row in run.table}) == 4
    for row in run.table:
        assert row["denominator_source"] == "num_items_in_batch"
    _check(run, close, lambda inputs, row: 1.0)
    assert run.residual < 1e-5
