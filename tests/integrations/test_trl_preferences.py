"""Preference losses of TRL: a row is a pair, whatever the reference model and the loss; what couples pairs is said."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

trl = pytest.importorskip("trl")
peft = pytest.importorskip("peft")

from datasets import Dataset  # noqa: E402

from tests.support import support  # noqa: E402

BETA = 0.5
ALONE = ["sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "apo_zero", "apo_down",
         "discopop", "sigmoid_norm"]  # fmt: skip
LORA = peft.LoraConfig(r=3, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
COUPLED = {"aot": "sorts", "aot_unpaired": "sorts", "sft": "mean over the tokens"}


@pytest.fixture
def pairs(words: Callable) -> list[dict[str, str]]:
    """Six prompts with a chosen and a rejected completion."""
    return [
        {"id": f"pair-{i}", "source": "made", "prompt": words(5), "chosen": " " + words(6), "rejected": " " + words(6)}
        for i in range(6)
    ]


def _sides(pair: dict[str, str], tokenizer: Any) -> list[tuple[list[int], int]]:
    """Tokens of the chosen and the rejected text and where the completion starts."""
    start = len(pair["prompt"].split())
    end = [tokenizer.eos_token_id]
    return [(tokenizer(pair["prompt"] + pair[side])["input_ids"] + end, start) for side in ("chosen", "rejected")]


@pytest.fixture
def dpo(
    settings: Callable, trained: Callable, tokenizer: Any, pairs: list[dict[str, str]], tiny_llama: Callable
) -> Callable[..., Any]:
    """Trains a model on the pairs by the DPOTrainer."""
    reference = tiny_llama(1)

    def run(model: Any, data: Any = pairs, options: Any = None, **changes: Any) -> Any:
        arguments = settings(beta=BETA, max_length=32, per_device_train_batch_size=3, **changes)
        return trained(
            lambda callbacks: trl.DPOTrainer(
                model, args=trl.DPOConfig(**arguments), train_dataset=Dataset.from_list(data),
                processing_class=tokenizer, callbacks=callbacks, **(options or {"ref_model": reference}),
            ),
        )  # fmt: skip

    return run


@pytest.mark.parametrize(
    ("kind", "precomputed"),
    [
        pytest.param("given", False, marks=support("TRL", "DPOTrainer, reference model given")),
        pytest.param("absent", False, marks=support("TRL", "DPOTrainer, reference model absent")),
        pytest.param("given", True, marks=support("TRL", "DPOTrainer, reference precomputed")),
    ],
)
def test_a_row_is_the_gradient_of_its_pairs_loss(
    kind: str, precomputed: bool, dpo: Callable, pairs: list[dict[str, str]], tiny_llama: Callable, tokenizer: Any,
    close: Callable,
) -> None:  # fmt: skip
    """Against the loss of Rafailov et al. 2023, equation 7, each side of each pair alone."""
    given = {"ref_model": tiny_llama(1)} if kind == "given" else {"peft_config": LORA}
    run = dpo(tiny_llama(0), precompute_ref_log_probs=precomputed, options=given)
    reference = tiny_llama(1 if kind == "given" else 0)  # without one, it is the model without its adapter
    assert (run.stage.meta["unit"], run.stage.meta["layout"], run.stage.meta["coupled_loss"]) == ("pair", "pairs", [])
    named = {pair["id"]: _sides(pair, tokenizer) for pair in pairs}
    assert sorted(row["example"] for row in run.table) == sorted(named)
    assert {(row["denominator"], row["denominator_source"]) for row in run.table} == {(6.0, "assumed mean")}

    def own_loss(sides: list[tuple[list[int], int]]) -> torch.Tensor:
        now = [run.likelihood(*side) for side in sides]
        run.model, trained_model = reference, run.model
        with torch.no_grad():
            before = [run.likelihood(*side) for side in sides]
        run.model = trained_model
        return -F.logsigmoid(BETA * ((now[0] - before[0]) - (now[1] - before[1])))

    for row, sketch in zip(run.table, run.sketches, strict=True):
        sides = named[row["example"]]
        assert row["tokens"] == sum(len(tokens) - start for tokens, start in sides)
        texts = [tokenizer.decode(tokens, skip_special_tokens=True) for tokens, _ in sides]
        assert run.texts[row["example"]].split("\n— preferred to —\n") == texts
        close(sketch, run.gradient(lambda sides=sides: own_loss(sides)), relative=1e-4)
    assert run.residual < 1e-5


def test_a_tied_head_is_left_out_of_preference_rows(dpo: Callable, tiny_gpt2: Callable) -> None:
    """The tied weight has two paths of which TRL hides one."""
    run = dpo(tiny_gpt2(0), options={"ref_model": tiny_gpt2(1)})
    coverage = run.stage.meta["coverage"]
    assert "lm_head" in coverage["silent"]
    assert set(coverage["partial"]) == {"transformer.wte.weight", "transformer.wpe.weight"}
    assert "residual" in coverage["partial"]["transformer.wte.weight"]


@support("TRL", "DPOTrainer, losses of one pair each (sigmoid, ipo, robust, ...)")
@pytest.mark.parametrize("loss", [*ALONE, "sigmoid-weighted"])
def test_every_loss_of_a_pair_alone_gives_exact_rows(
    loss: str, dpo: Callable, tiny_llama: Callable, close: Callable
) -> None:
    """WPO's weights are a pair's own."""
    kind, _, weighted = loss.partition("-")
    smoothing = {"label_smoothing": 0.1} if kind in ("exo_pair", "robust") else {}
    run = dpo(tiny_llama(0), loss_type=[kind], use_weighting=bool(weighted), **smoothing)
    assert run.stage.meta["coupled_loss"] == []
    named = {row["id"]: row for row in run.trainer.train_dataset}
    for row, sketch in zip(run.table, run.sketches, strict=True):
        batch = run.trainer.data_collator([named[row["example"]]])
        close(sketch, run.gradient(lambda batch=batch: run.trainer.compute_loss(run.model, batch)), relative=1e-4)


@support("TRL", "DPOTrainer, losses that couple pairs (aot, aot_unpaired, sft): reported")
@pytest.mark.parametrize("loss", COUPLED)
def test_losses_that_couple_pairs_say_so(loss: str, dpo: Callable, tiny_llama: Callable, caplog: Any) -> None:
    run = dpo(tiny_llama(0), loss_type=["sigmoid", loss])
    (reason,) = run.stage.meta["coupled_loss"]
    assert COUPLED[loss] in reason
    assert f"coupled loss: {reason}" in caplog.text
    assert run.residual < 1e-5, "rows still add up to the gradient"


def test_pairs_without_an_id_column_are_named_by_both_sides(
    dpo: Callable, pairs: list[dict[str, str]], tiny_llama: Callable
) -> None:
    """Two pairs share their chosen side, two their rejected one."""
    pairs[1] |= {"prompt": pairs[0]["prompt"], "chosen": pairs[0]["chosen"]}
    pairs[3] |= {"prompt": pairs[2]["prompt"], "rejected": pairs[2]["rejected"]}
    run = dpo(tiny_llama(0), [{k: v for k, v in pair.items() if k != "id"} for pair in pairs])
    names = [row["example"] for row in run.table]
    assert len(set(names)) == 6
    assert all(len(name) == 16 and int(name, 16) >= 0 for name in names)


@support("TRL", "RewardTrainer")
@pytest.mark.parametrize("centred", [None, 0.3])
def test_a_reward_row_is_its_pairs_gradient(
    centred: float | None, pairs: list[dict[str, str]], settings: Callable, trained: Callable, tiny_llama: Callable,
    tokenizer: Any, close: Callable,
) -> None:  # fmt: skip
    """Bradley & Terry 1952, with the trainer's optional centring."""
    model = tiny_llama(0, "LlamaForSequenceClassification", num_labels=1)
    arguments = trl.RewardConfig(**settings(center_rewards_coefficient=centred))
    run = trained(
            lambda callbacks: trl.RewardTrainer(
            model, args=arguments, train_dataset=Dataset.from_list(pairs), processing_class=tokenizer,
            callbacks=callbacks,
        ),
    )  # fmt: skip
    named = {pair["id"]: _sides(pair, tokenizer) for pair in pairs}
    assert len(run.table) == 4
    for row, sketch in zip(run.table, run.sketches, strict=True):

        def own_loss(sides: Any = named[row["example"]]) -> torch.Tensor:
            chosen, rejected = (run.model(input_ids=torch.tensor([tokens])).logits[0, 0] for tokens, _ in sides)
            return -F.logsigmoid(chosen - rejected) + (centred or 0.0) * (chosen + rejected) ** 2

        close(sketch, run.gradient(own_loss), relative=1e-4)
    assert run.stage.steps()["audit_residual"][0].as_py() < 1e-5


@support("TRL", "KTOTrainer")
@pytest.mark.parametrize(("loss", "batch"), [("kto", 3), ("apo_zero_unpaired", 3), ("apo_zero_unpaired", 1)])
def test_an_unpaired_row_is_its_examples_gradient_at_the_batchs_kl(
    loss: str, batch: int, words: Callable, settings: Callable, trained: Callable, tiny_llama: Callable,
    tokenizer: Any, close: Callable,
) -> None:  # fmt: skip
    """Ethayarajh et al. 2024, equation 7, and its APO variant. A single row has one gradient for all of its tokens,
    which looks like a divided likelihood and must not be taken for one.
    """
    rows = [{"id": str(i), "prompt": words(5), "completion": " " + words(6), "label": i % 2 == 0} for i in range(6)]
    model, reference = tiny_llama(0), tiny_llama(1)
    weights = {"desirable_weight": 1.5, "undesirable_weight": 0.7}
    arguments = settings(loss_type=loss, beta=BETA, per_device_train_batch_size=batch, max_length=32, **weights)
    run = trained(
            lambda callbacks: trl.KTOTrainer(
            model, reference, args=trl.KTOConfig(**arguments), train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer, callbacks=callbacks,
        ),
    )  # fmt: skip
    assert bool(run.stage.meta["coupled_loss"]) is (loss == "kto")
    named = {row["id"]: row for row in run.trainer.train_dataset}

    def ratio(row: dict[str, Any], completion: str) -> torch.Tensor:
        text = (row["prompt_ids"] + row[completion], len(row["prompt_ids"]))
        run.model, other = reference, run.model
        with torch.no_grad():
            before = run.likelihood(*text)
        run.model = other
        return run.likelihood(*text) - before

    for row, sketch in zip(run.table, run.sketches, strict=True):
        assert row["denominator"] == 2 * batch
        own = named[row["example"]]
        micro = [named[r["example"]] for r in run.table if r["micro_batch"] == row["micro_batch"]]
        kl = 0.0
        if loss == "kto":
            with torch.no_grad():
                kl = max(0.0, sum(float(ratio(one, "KL_completion_ids")) for one in micro) / len(micro))

        def own_loss(own: Any = own, kl: float = kl) -> torch.Tensor:
            sign = 1 if own["label"] else -1
            weight = weights["desirable_weight" if own["label"] else "undesirable_weight"]
            return weight * (1 - torch.sigmoid(sign * BETA * (ratio(own, "completion_ids") - kl)))

        close(sketch, run.gradient(own_loss), relative=1e-4)


@pytest.fixture
def experimental(
    settings: Callable, trained: Callable, tokenizer: Any, tiny_llama: Callable, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Any]:
    """Trains on rows by a trainer of ``trl.experimental``."""
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")

    def run(name: str, rows: list[dict[str, str]], **changes: Any) -> Any:
        module = __import__(f"trl.experimental.{name.lower()}", fromlist=["*"])
        arguments = getattr(module, f"{name}Config")(**settings(max_length=32, remove_unused_columns=False, **changes))
        model = tiny_llama(0)
        return trained(
            lambda callbacks: getattr(module, f"{name}Trainer")(
                model, args=arguments, train_dataset=Dataset.from_list(rows), processing_class=tokenizer,
                callbacks=callbacks,
            ),
        )  # fmt: skip

    return run


@support("TRL", "CPOTrainer and ORPOTrainer (experimental)")
def test_cpo_rows_are_pairs(
    pairs: list[dict[str, str]], experimental: Callable, tokenizer: Any, close: Callable
) -> None:
    """Xu et al. 2024, equation 3, without the likelihood term, which would couple pairs."""
    run = experimental("CPO", pairs, cpo_alpha=0.0, beta=BETA)
    assert run.stage.meta["coupled_loss"] == []
    named = {pair["id"]: _sides(pair, tokenizer) for pair in pairs}
    for row, sketch in zip(run.table, run.sketches, strict=True):

        def own_loss(sides: Any = named[row["example"]]) -> torch.Tensor:
            bos = tokenizer.bos_token_id  # this trainer begins every text with it
            chosen, rejected = (run.likelihood([bos, *tokens], start + 1) for tokens, start in sides)
            return -F.logsigmoid(BETA * (chosen - rejected))

        close(sketch, run.gradient(own_loss), relative=1e-4)


@support("TRL", "CPOTrainer and ORPOTrainer (experimental)")
@pytest.mark.parametrize("name", ["CPO", "ORPO"])
def test_likelihood_terms_couple_pairs(name: str, pairs: list[dict[str, str]], experimental: Callable) -> None:
    run = experimental(name, pairs)
    assert "mean over the tokens" in run.stage.meta["coupled_loss"][0]
    assert run.stage.meta["unit"] == "pair"
    assert len(run.table) == 4
    assert run.residual < 1e-5


@support("TRL", "TPOTrainer (experimental)")
@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_tpo_rows_are_triples_or_pairs(
    alpha: float, pairs: list[dict[str, str]], words: Callable, experimental: Callable, tokenizer: Any, close: Callable
) -> None:
    """The reference answer's likelihood is divided by its tokens in the micro-batch, which is one example here."""
    rows = [{**pair, "reference": " " + words(6)} for pair in pairs]
    run = experimental("TPO", rows, tpo_alpha=alpha, beta=BETA, per_device_train_batch_size=1)
    assert run.stage.meta["unit"] == ("triple" if alpha else "pair")
    named = {row["id"]: row for row in rows}
    for row, sketch in zip(run.table, run.sketches, strict=True):
        own = named[row["example"]]
        reference = _sides({**own, "chosen": own["reference"]}, tokenizer)[0]
        if alpha:
            assert run.texts[row["example"]].endswith("— reference answer —\n" + own["prompt"] + own["reference"])

        def own_loss(own: Any = own, reference: Any = reference) -> torch.Tensor:
            chosen, rejected = (run.likelihood(*side) for side in _sides(own, tokenizer))
            tokens, start = reference
            return -F.logsigmoid(BETA * (chosen - rejected)) - alpha * run.likelihood(*reference) / (
                len(tokens) - start
            )

        close(sketch, run.gradient(own_loss), relative=1e-4)
