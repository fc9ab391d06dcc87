"""Experts that share their tokens' batch: each example's gradient, found inside the module's own forward."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import transformers
from torch import nn
from torch.overrides import _get_current_function_mode

from tests.support import support
from trainer_attrib.tap import experts
from trainer_attrib.tap.experts import capture_experts
from trainer_attrib.tap.plan import SketchPlan, plan_sketch
from trainer_attrib.tap.projections import Projections
from trainer_attrib.tap.record import Record
from trainer_attrib.testing.oracle import example_gradients, project_gradient, tap_of
from trainer_attrib.types import Layout, SketchConfig

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


@support("Layers", "MoE experts, stacked as in transformers' Mixtral, OLMoE, Qwen2-MoE and Qwen3-MoE, after `capture_experts()`")
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
