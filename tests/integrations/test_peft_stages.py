"""Stages of a model that adapters come to and go from: every link, recorded through the Trainer."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

peft = pytest.importorskip("peft")

from tests.analysis.adapted import TARGET_WEIGHTS, adapted, adapters_of, llama, merged, record  # noqa: E402
from tests.support import support  # noqa: E402
from trainer_attrib.ledger.links import Link  # noqa: E402
from trainer_attrib.ledger.reader import Ledger  # noqa: E402
from trainer_attrib.tap.names import parameters_by_name  # noqa: E402


@pytest.fixture
def fit(tmp_path: Path) -> Callable[..., Any]:
    """Trains a model as a recorded stage of one ledger and returns it."""
    return lambda model, stage, seed=0, **settings: record(model, tmp_path, stage, seed, **settings)


@pytest.fixture
def link(tmp_path: Path) -> Callable[[str], Link]:
    return lambda stage: Link.of(Ledger(tmp_path / "ledger").stage(stage).meta)


@support("PEFT", "stages: full, adapter added, merged, adapter added again, full")
@pytest.mark.parametrize("rank", [2, 4], ids=["same rank", "other rank"])
def test_pretrain_adapter_merge_and_another_adapter(
    rank: int, fit: Callable, link: Callable, caplog, tmp_path: Path
) -> None:
    model = fit(llama(), "pretrain")
    trained = Ledger(tmp_path / "ledger").stage("pretrain").meta["trainable"]
    with caplog.at_level(logging.INFO):
        model = fit(adapted(model, r=2, lora_alpha=3), "sft")
    assert link("sft") == Link("pretrain", "adapter added", added=adapters_of("default"), frozen=tuple(trained))
    said = f"continues 'pretrain' (8 adapter weights added, {len(trained)} trained weights now frozen)"
    assert said in caplog.text

    base = {name: p.detach().clone() for name, p in parameters_by_name(model).items()}
    model = model.merge_and_unload()
    for name in TARGET_WEIGHTS:  # the merge that the link stands for
        a, b = (base[name.replace(".weight", f".lora_{side}.default.weight")] for side in "AB")
        torch.testing.assert_close(model.get_parameter(name), base[name] + 1.5 * b @ a)
    model = fit(adapted(model, r=rank), "dpo")
    found = link("dpo")
    assert (found.parent, found.kind, found.merged) == ("sft", "merged", TARGET_WEIGHTS)
    assert found.added == found.removed == adapters_of("default")  # a new adapter under the old one's name

    fit(merged(model), "further")
    found = link("further")
    assert (found.parent, found.kind, found.merged) == ("dpo", "merged", TARGET_WEIGHTS)
    assert found.removed == adapters_of("default")
    assert [s.name for s in Ledger(tmp_path / "ledger").lineage()] == ["pretrain", "sft", "dpo", "further"]
    assert all(stage.problems() == [] for stage in Ledger(tmp_path / "ledger").stages())


@support("PEFT", "stages: merged LoRA, rsLoRA, DoRA, LoRA on embeddings, modules_to_save")
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_rslora": True, "r": 4},
        {"use_dora": True},
        {"target_modules": ["embed_tokens", "q_proj"]},
        {"modules_to_save": ["lm_head"]},
    ],
    ids=["lora", "rslora", "dora", "embedding", "modules_to_save"],
)  # fmt: skip
def test_a_merged_adapter_is_recognized_whatever_its_method(
    settings: dict[str, Any], fit: Callable, link: Callable
) -> None:
    """From a base that was never recorded."""
    model = fit(adapted(llama(), **settings), "sft", learning_rate=0.1)
    assert link("sft").parent is None
    fit(merged(model), "full")
    assert (link("full").parent, link("full").kind) == ("sft", "merged")


def test_an_adapter_merged_at_another_strength_is_no_child(fit: Callable, link: Callable) -> None:
    model = fit(adapted(llama()), "sft", learning_rate=0.1)
    for layer in model.modules():
        if hasattr(layer, "scale_layer"):
            layer.scale_layer(0.5)
    fit(adapted(model.merge_and_unload()), "more")
    assert link("more").parent is None
    assert "neither those at the end of 'sft' nor what merging its adapter gives" in link("more").reason


@support("PEFT", "stages: several adapters, one active")
def test_several_adapters_and_one_active(fit: Callable, link: Callable, tmp_path: Path) -> None:
    """The second begins from the first's end, trains alone, and alone is merged."""
    model = fit(adapted(llama()), "one")
    first = {name: p.detach().clone() for name, p in parameters_by_name(model).items()}
    model.add_adapter("other", model.peft_config["default"])
    model.set_adapter("other")
    fit(model, "two")
    assert link("two") == Link("one", "adapter added", added=adapters_of("other"), frozen=adapters_of("default"))
    stage = Ledger(tmp_path / "ledger").stage("two")
    assert tuple(stage.meta["trainable"]) == adapters_of("other")
    assert {u["A"] for u in stage.meta["low_rank_updates"]} <= set(adapters_of("other"))
    for name in adapters_of("default"):
        assert torch.equal(parameters_by_name(model)[name], first[name])
    fit(adapted(model.merge_and_unload()), "three")
    assert (link("three").parent, link("three").kind) == ("two", "merged")


def test_a_discarded_adapter_is_not_the_parent(fit: Callable, link: Callable) -> None:
    """Two adapters on one recorded base are branches of it, also where both have one name."""
    model = fit(llama(), "pretrain")
    model = fit(adapted(model), "first")
    model = fit(adapted(model.unload()), "second")
    assert link("first").parent == link("second").parent == "pretrain"
    fit(model.unload().requires_grad_(True), "further")
    assert link("further") == Link("pretrain", "same")


def test_a_trained_copy_of_the_head_goes_on_from_the_head(fit: Callable, link: Callable, tmp_path: Path) -> None:
    model = fit(llama(), "pretrain")
    model = fit(adapted(model, modules_to_save=["lm_head"]), "sft")
    assert link("sft").kind == "adapter added"
    assert link("sft").added == tuple(sorted([*adapters_of("default"), "lm_head.original_module.weight"]))
    stage = Ledger(tmp_path / "ledger").stage("sft")
    assert set(stage.meta["trainable"]) == {*adapters_of("default"), "lm_head.weight"}
    start, end = stage.snapshot("start")["lm_head.weight"], stage.snapshot("end")["lm_head.weight"]
    assert torch.equal(start, Ledger(tmp_path / "ledger").stage("pretrain").snapshot("end")["lm_head.weight"])
    assert not torch.equal(start, end)
    assert torch.equal(merged(model).lm_head.weight, end)
