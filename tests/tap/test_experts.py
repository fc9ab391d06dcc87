"""Experts that share their tokens' batch: each example's gradient, found inside the module's own forward."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import datasets
import pytest
import torch
import transformers
from torch import nn
from torch.overrides import _get_current_function_mode

from tests.support import support
from trainer_attrib.errors import UnsupportedLayerError
from trainer_attrib.integrations.huggingface import AttributionCallback
from trainer_attrib.ledger.reader import Ledger
from trainer_attrib.numerics.audit import regress
from trainer_attrib.tap import experts
from trainer_attrib.tap.experts import capture_experts
from trainer_attrib.tap.plan import SketchPlan, plan_sketch
from trainer_attrib.tap.projections import Projections, of_shard
from trainer_attrib.tap.record import Record
from trainer_attrib.tap.segments import Segments
from trainer_attrib.tap.shards import Shard
from trainer_attrib.tap.sites import experts_of
from trainer_attrib.testing.oracle import example_gradients, project_gradient, tap_of
from trainer_attrib.types import Layout, SketchConfig

COMBINATION = "MoE experts and routers of Mixtral, OLMoE, Qwen2-MoE and Qwen3-MoE, after `capture_experts()`"
FAMILIES = {
    "Mixtral": {"num_local_experts": 5, "intermediate_size": 24},
    "Olmoe": {"num_experts": 5, "intermediate_size": 24},
    "Qwen2Moe": {"num_experts": 5, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 20},
    "Qwen3Moe": {"num_experts": 5, "moe_intermediate_size": 24},
}


@pytest.fixture(autouse=True)
def known_experts(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Captured here, forgotten afterwards; and no mode is left behind."""
    monkeypatch.setattr(experts, "_EXPERTS", {})
    capture_experts()
    yield
    assert _get_current_function_mode() is None


def _model(family: str = "Mixtral", implementation: str = "eager", **settings: object) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"vocab_size": 30, "hidden_size": 16, "num_hidden_layers": 2, "num_experts_per_tok": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "initializer_range": 0.3}
    config = getattr(transformers, f"{family}Config")(**sizes, **heads, **FAMILIES[family], **settings)
    config._experts_implementation = implementation
    return getattr(transformers, f"{family}ForCausalLM")(config).train()


def _ids(rows: int = 4) -> torch.Tensor:
    return torch.randint(0, 30, (rows, 6), generator=torch.Generator().manual_seed(1))


def _losses(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    logits = model(input_ids=ids).logits[:, :-1]
    return nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none").sum(1)


def _plan(model: nn.Module, rank: int = 4) -> SketchPlan:
    return plan_sketch(model, SketchConfig(rank=rank, modules="*.experts,*.gate"))


def _captured(model: nn.Module, ids: torch.Tensor, layout: Layout = Layout.ROWS) -> tuple[Record, Projections]:
    projections = Projections(_plan(model), model)
    with tap_of(model, projections) as tap:
        record = tap.open(len(ids), layout)
        _losses(model, ids).sum().backward()
    return record, projections


@support("Layers", COMBINATION)
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("family", FAMILIES)
def test_rows_are_each_examples_gradient(family: str, implementation: str) -> None:
    model, ids = _model(family, implementation), _ids()
    record, projections = _captured(model, ids)
    names = {weight.name.split(".", 3)[3] for weight in projections.plan.weights}
    assert names == {"mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.gate.weight"}
    assert record.skipped == {}
    exact = example_gradients(model, lambda: _losses(model, ids))
    expected = torch.stack([project_gradient(projections.plan, projections, g) for g in exact])
    for weight in projections.plan.weights:
        assert expected[:, weight.span].norm(dim=1).min() > 1e-3
        torch.testing.assert_close(record.sketches[:, weight.span], expected[:, weight.span], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_an_expert_that_gets_no_token(implementation: str) -> None:
    model, ids = _model(implementation=implementation), _ids(2)[:, :2]
    record, projections = _captured(model, ids)
    gradient = model.model.layers[0].mlp.experts.down_proj.grad
    assert not gradient.flatten(1).any(1).all(), "some expert is to have no token"
    assert record.skipped == {}
    summed = project_gradient(projections.plan, projections, _gradients(model))
    torch.testing.assert_close(record.sketches.sum(0), summed, rtol=1e-5, atol=1e-5)


def _gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_pairs_fold_their_two_sides() -> None:
    model, ids = _model(), _ids(6)
    rows, _ = _captured(model, ids)
    pairs, _ = _captured(model, ids, Layout.PAIRS)
    assert len(pairs.sketches) == 3
    torch.testing.assert_close(pairs.sketches, rows.sketches.view(2, 3, -1).sum(0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_documents_of_a_packed_row(implementation: str) -> None:
    """Without attention, through which documents of this implementation would see each other."""
    whole, lengths = _model(implementation=implementation), (5, 3, 4)
    model = nn.ModuleDict({"block": whole.model.layers[0].mlp})
    positions = torch.cat([torch.arange(n) for n in lengths] + [torch.zeros(2, dtype=torch.long)])[None]
    x, projections = torch.randn(*positions.shape, 16), Projections(_plan(model), model)

    def losses() -> torch.Tensor:
        loss = model["block"](x)[0].square().sum(1)
        return torch.stack([part.sum() for part in loss[:-2].split(lengths)])

    with tap_of(model, projections) as tap:
        record = tap.open(1, Layout.SEGMENTS, Segments.of(positions))
        losses().sum().backward()
    assert record.skipped == {}
    exact = torch.stack([project_gradient(projections.plan, projections, g) for g in example_gradients(model, losses)])
    torch.testing.assert_close(record.sketches, exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant: bool, implementation: str) -> None:
    model, ids = _model(implementation=implementation), _ids()
    plain, _ = _captured(model, ids)
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    again, _ = _captured(model, ids)
    assert again.skipped == {}
    torch.testing.assert_close(again.sketches, plain.sketches, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_gradients_are_bit_identical(implementation: str) -> None:
    model, ids = _model(implementation=implementation), _ids()
    loss = _losses(model, ids).sum()
    loss.backward()
    plain = {name: gradient.clone() for name, gradient in _gradients(model).items()}
    model.zero_grad()
    with tap_of(model, Projections(_plan(model), model)) as tap:
        tap.open(len(ids), Layout.ROWS)
        again = _losses(model, ids).sum()
        again.backward()
    assert torch.equal(loss, again)
    assert all(torch.equal(plain[name], gradient) for name, gradient in _gradients(model).items())
    hooks = [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks or m._forward_hooks_always_called]
    assert hooks == []


def test_nothing_is_watched_without_a_record_or_gradients() -> None:
    model, ids = _model(), _ids()
    with tap_of(model, Projections(_plan(model), model)) as tap:
        _losses(model, ids)
        record = tap.open(len(ids), Layout.ROWS)
        with torch.no_grad():
            _losses(model, ids)
        assert not record.forwards


def test_a_forward_that_raises_leaves_no_mode_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = _model(), _ids()

    def broken(x: torch.Tensor) -> torch.Tensor:
        raise KeyError("broken")

    monkeypatch.setattr(model.model.layers[1].mlp.experts.act_fn, "forward", broken)
    with tap_of(model, Projections(_plan(model), model)) as tap:
        tap.open(len(ids), Layout.ROWS)
        with pytest.raises(KeyError, match="broken"):
            _losses(model, ids)
        assert _get_current_function_mode() is None


def test_an_interrupt_inside_leaves_no_mode_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch calls no hook then; detaching ends it."""
    model, ids = _model(), _ids()

    def interrupted(x: torch.Tensor) -> torch.Tensor:
        raise KeyboardInterrupt

    monkeypatch.setattr(model.model.layers[1].mlp.experts.act_fn, "forward", interrupted)
    with pytest.raises(KeyboardInterrupt):
        _captured(model, ids)


def test_an_unknown_kernel_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def kernel(self: nn.Module, tokens: torch.Tensor, index: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        hidden = torch.einsum("th,efh->tef", tokens, self.gate_up_proj).mean(1)
        return hidden[:, : tokens.shape[1]] * scores.sum(1, keepdim=True)

    interface = transformers.integrations.moe.ALL_EXPERTS_FUNCTIONS
    monkeypatch.setitem(interface._global_mapping, "einsum", kernel)
    record, _ = _captured(_model(implementation="einsum"), _ids())
    found = {name.rpartition(".")[2]: why for name, why in record.skipped.items()}
    assert found == {
        "gate_up_proj": "its experts run through einsum, which is not known",
        "down_proj": "no product of its experts was seen",
    }


def test_experts_that_are_stored_otherwise_are_refused() -> None:
    model = _model()
    model.model.layers[0].mlp.experts.is_transposed = True
    model.model.layers[1].mlp.experts.has_bias = True
    reasons = {name.split(".", 2)[2]: why for name, why in _plan(model).uncovered.items() if "experts" in name}
    assert reasons["0.mlp.experts.down_proj"] == "its experts are stored transposed, which is not known yet"
    assert reasons["1.mlp.experts.gate_up_proj"] == "its experts have biases, which are not known yet"


def test_experts_that_are_not_asked_for_are_not_covered(monkeypatch: pytest.MonkeyPatch) -> None:
    model = _model()
    plan = _plan(model)
    monkeypatch.setattr(experts, "_EXPERTS", {})
    uncovered = plan_sketch(model, SketchConfig()).uncovered
    assert uncovered["model.layers.0.mlp.experts.down_proj"] == "MixtralExperts is not a known layer type"
    with pytest.raises(UnsupportedLayerError, match=r"is a Mixtral.*, not a known layer type here"):
        experts_of(model, plan)


def test_grouped_products_in_bfloat16() -> None:
    """torch's own grouped product, which transformers takes for this type. Rounding leaves some 0.4 % in the audit."""
    model, ids = _model(implementation="grouped_mm").bfloat16(), _ids()
    record, projections = _captured(model, ids)
    assert record.skipped == {}
    whole = project_gradient(projections.plan, projections, _gradients(model))
    for weight in projections.plan.weights:
        _, residual = regress(whole[weight.span], record.sketches.sum(0)[weight.span])
        assert residual < 1e-2


def _trained(folder: Path, callbacks: list[AttributionCallback], implementation: str) -> transformers.Trainer:
    model = _model("Qwen3Moe", implementation)
    rows = [{"input_ids": row, "labels": row} for row in _ids(8).tolist()]
    settings = {"report_to": [], "disable_tqdm": True, "use_cpu": True, "save_strategy": "no", "logging_steps": 1}
    arguments = transformers.TrainingArguments(
        str(folder / "output"), per_device_train_batch_size=4, max_steps=8, learning_rate=3e-3, **settings
    )
    trainer = transformers.Trainer(
        model, arguments, train_dataset=datasets.Dataset.from_list(rows), callbacks=callbacks,
        data_collator=transformers.default_data_collator,
    )  # fmt: skip
    trainer.train()
    return trainer


@support("Layers", COMBINATION)
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_a_training_is_recorded_whole_and_stays_what_it_was(implementation: str, tmp_path: Path) -> None:
    """Eight steps with the optimizer's second moments, which are folded in after the fourth."""
    callback = AttributionCallback(tmp_path / "ledger", stage="one", strict=True, sketch=SketchConfig(rank=4))
    recorded, plain = _trained(tmp_path, [callback], implementation), _trained(tmp_path, [], implementation)
    assert [row.get("loss") for row in recorded.state.log_history] == [
        row.get("loss") for row in plain.state.log_history
    ]
    weights = plain.model.state_dict()
    assert all(torch.equal(weights[name], weight) for name, weight in recorded.model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in recorded.model.modules())
    stage = Ledger(tmp_path / "ledger").stage("one")
    names = {name for name in weights if ".experts." in name or name.endswith(".gate.weight")}
    coverage = stage.meta["coverage"]
    assert not coverage["partial"]
    assert not coverage["silent"]
    assert not names & coverage["uncovered"].keys()
    norms = sum(p.numel() for name, p in recorded.model.named_parameters() if "norm" in name)
    assert coverage["share"] == pytest.approx(1 - norms / sum(p.numel() for p in recorded.model.parameters()))
    steps = stage.steps()
    assert set(steps["version"].to_pylist()) == {0, 1}
    assert max(steps["audit_residual"].to_pylist()) < 1e-5
    by_weight = dict(zip(steps["audit_weight"].to_pylist(), steps["audit_residual"].to_pylist(), strict=True))
    assert len(by_weight) == 8


def test_second_moments_of_a_stack_are_those_of_its_matrix() -> None:
    """Row means over the rows of all experts, and the same from shards that hold some experts each."""
    model = _model()
    weight = next(w for w in _plan(model).weights if w.name.endswith("gate_up_proj"))
    parameter = model.get_parameter(weight.name)
    assert (weight.rows, weight.columns) == (5 * 48, 16)
    assert weight.matrix_of(parameter).shape == (240, 16)
    projections = Projections(_plan(model), model)
    left, right = projections[weight.name].sides
    parts = [Shard(parameter[:3], 0, tuple(parameter.shape)), Shard(parameter[3:], 3, tuple(parameter.shape))]
    sketches = [of_shard(left, part, 5) @ weight.matrix_of(part.local) @ right.T for part in parts]
    torch.testing.assert_close(sum(sketches), projections.sketch(weight, parameter, None), rtol=1e-5, atol=1e-5)


def test_compiled_experts_are_left_out_and_reported() -> None:
    model, ids = _model(implementation="grouped_mm"), _ids()
    projections = Projections(plan_sketch(model, SketchConfig(rank=4)), model)
    plain = _losses(model, ids)
    model.compile(backend="aot_eager")
    with tap_of(model, projections) as tap:
        for _ in range(2):
            record = tap.open(len(ids), Layout.ROWS)
            losses = _losses(model, ids)
            losses.sum().backward()
            assert torch.equal(losses, plain)
            assert len(record.skipped) == 6
            assert set(record.skipped.values()) == {"experts in compiled code are not captured yet"}
            assert len(record.backwards) == len(tap.modules) - 6
    torch._dynamo.reset()
