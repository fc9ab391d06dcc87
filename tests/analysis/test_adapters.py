"""Answers about models whose stages trained different weights, against what the recorded weights really do."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("peft")

from tests.analysis.adapted import (
    TARGET_WEIGHTS,
    adapted,
    llama,
    losses,
    merged,
    record,
    trainer_of,
)
from tests.support import support
from trainer_attrib import Analyzer
from trainer_attrib.errors import NotComparableError
from trainer_attrib.types import SketchConfig


def values(model: Any) -> torch.Tensor:
    return losses().values(copy.deepcopy(model))


def effects(analyzer: Analyzer, method: str, programs: Any = None) -> dict[str, torch.Tensor]:
    rows = analyzer.stage_effects([losses()], method, programs).rows
    return {s.name: torch.tensor([r.effect for r in rows if r.stage == s.name]) for s in analyzer.lineage}


def new_head(model: Any) -> None:
    """For two more words."""
    model.lm_head = torch.nn.Linear(24, 31, bias=False)
    model.config.vocab_size = 31


def same(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 0.0) -> None:
    assert float(expected.abs().max()) > 1e-3, "comparing with zeros proves nothing"
    torch.testing.assert_close(found.float(), expected.float(), rtol=tolerance, atol=tolerance)


@support("PEFT", "analysis: stage effects, with the adapter or merged")
@pytest.mark.parametrize("settings", [{}, {"use_dora": True}, {"modules_to_save": ["lm_head"]}, {"use_rslora": True}],
                         ids=["lora", "dora", "modules_to_save", "rslora"])  # fmt: skip
@pytest.mark.parametrize("as_merged", [False, True], ids=["wrapped", "merged"])
def test_removing_an_adapters_stage_gives_the_base_models_outputs(
    settings: dict[str, Any], as_merged: bool, tmp_path: Path
) -> None:
    model = llama()
    untrained = values(model)
    base = values(record(model, tmp_path, "pretrain"))
    model = record(adapted(model, **settings), tmp_path, "sft", seed=1, learning_rate=0.1)
    if as_merged:
        model = merged(model)
    final = values(model)
    analyzer = Analyzer(tmp_path / "ledger", model)
    assert [stage.name for stage in analyzer.lineage] == ["pretrain", "sft"]
    # DoRA divides by a norm that the merge rounds otherwise; all other adapters are nothing at their start.
    tolerance = 1e-5 if settings.get("use_dora") else 0.0
    for method in ("subtract", "change"):
        if settings.get("use_dora") and not as_merged:
            with pytest.raises(NotComparableError, match=r"DoRA's magnitudes that came later") as caught:
                analyzer.stage_effects([losses()], method)
            assert "merge_and_unload" in caught.value.fix
            continue
        same(effects(analyzer, method)["sft"], final - base, tolerance)
    if not settings.get("use_dora") or as_merged:
        same(effects(analyzer, "change")["pretrain"], base - untrained, tolerance)


def test_an_earlier_stages_change_is_taken_out_below_the_adapter(tmp_path: Path) -> None:
    """Its displacement of the base weights, the adapter staying as it was trained."""
    model = llama()
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    model = record(model, tmp_path, "pretrain")
    model = record(adapted(model), tmp_path, "sft", seed=1)
    final, without = values(model), copy.deepcopy(model)
    inner = without.base_model.model
    with torch.no_grad():
        for name, p in inner.named_parameters():
            if "lora" not in name:
                p.copy_(start[name.replace(".base_layer", "")])
    same(effects(Analyzer(tmp_path / "ledger", model), "subtract")["pretrain"], final - values(without), 1e-4)


def test_every_stage_of_a_model_that_was_merged_and_trained_on(tmp_path: Path) -> None:
    """Pretraining, adapter, merge, full training: what happened in each, and the first stages taken out again."""
    model, seen = llama(), []
    seen.append(values(model))
    states = [copy.deepcopy(model.state_dict())]
    model = record(model, tmp_path, "pretrain")
    seen.append(values(model))
    states.append(copy.deepcopy(model.state_dict()))
    model = merged(record(adapted(model, lora_alpha=16), tmp_path, "sft", seed=1, learning_rate=0.1))
    seen.append(values(model))
    states.append(copy.deepcopy(model.state_dict()))
    model = record(model, tmp_path, "further", seed=2)
    seen.append(values(model))
    analyzer = Analyzer(tmp_path / "ledger", model)
    found = effects(analyzer, "change")
    for i, stage in enumerate(("pretrain", "sft", "further")):
        same(found[stage], seen[i + 1] - seen[i], 1e-6)
    for stage, (before, after) in {"pretrain": states[:2], "sft": states[1:]}.items():
        without = copy.deepcopy(model)
        with torch.no_grad():
            for name, p in without.named_parameters():
                p.add_(before[name] - after[name])
        same(effects(analyzer, "subtract")[stage], seen[-1] - values(without), 1e-4)
    with pytest.raises(NotComparableError, match=r"'sft' cannot be run again .* 8 weights .*lora_A") as caught:
        analyzer.stage_effects([losses()], "retrain", {"sft": print, "further": print})
    assert "subtract" in caught.value.fix


@support("PEFT", "analysis: stage effects, with the adapter or merged")
def test_two_adapters_in_turn_on_a_base_that_was_never_recorded(tmp_path: Path) -> None:
    """The usual way: download, adapt, merge, adapt again. The base before the merge follows from the first adapter."""
    model = llama()
    base = values(model)
    model = record(adapted(model), tmp_path, "sft", seed=1, learning_rate=0.1)
    middle = values(model)
    model = record(adapted(model.merge_and_unload()), tmp_path, "dpo", seed=2, learning_rate=0.1)
    final = values(model)
    for at_the_end in (model, model.merge_and_unload()):
        analyzer = Analyzer(tmp_path / "ledger", at_the_end)
        assert [stage.name for stage in analyzer.lineage] == ["sft", "dpo"]
        found = effects(analyzer, "change")
        same(found["sft"], middle - base, 1e-4)
        same(found["dpo"], final - middle, 1e-4)


def test_a_merged_dora_over_an_unknown_base_says_what_is_missing(tmp_path: Path) -> None:
    model = record(adapted(llama(), use_dora=True), tmp_path, "sft", learning_rate=0.1)
    model = record(merged(model), tmp_path, "further", seed=1)
    with pytest.raises(NotComparableError, match=r"The start of stage 'sft' is not known for 4 weights") as caught:
        Analyzer(tmp_path / "ledger", model).stage_effects([losses()], "change")
    assert TARGET_WEIGHTS[0] in str(caught.value)
    assert "before the merge" in caught.value.fix


def test_retraining_without_pretraining_trains_the_adapter_only(tmp_path: Path) -> None:
    def programme(model: Any) -> Any:
        return trainer_of(model, tmp_path / "again", "sft", [], seed=1)

    model = llama()
    initial = copy.deepcopy(model)
    model = record(model, tmp_path, "pretrain")
    torch.manual_seed(4)
    model = record(adapted(model), tmp_path, "sft", seed=1)
    torch.manual_seed(4)
    alone = adapted(initial)
    trainer_of(alone, tmp_path / "alone", "sft", [], seed=1).train()
    analyzer = Analyzer(tmp_path / "ledger", model)
    found = effects(analyzer, "retrain", {"sft": programme})
    same(found["pretrain"], values(model) - values(alone))
    programs = {"pretrain": lambda m: trainer_of(m, tmp_path / "again", "pretrain", []), "sft": programme}
    assert analyzer.closure(programs).exact


def test_a_new_head_is_taken_as_it_was_added(tmp_path: Path) -> None:
    model = record(llama(), tmp_path, "pretrain")
    new_head(model)
    head = model.lm_head.weight.detach().clone()
    begun = values(model)
    model = record(model, tmp_path, "more", seed=1)
    result = Analyzer(tmp_path / "ledger", model).stage_effects([losses()], "change")
    assert "before stage 'more', lm_head.weight are taken as they were when they were added" in result.caveats
    first = llama()
    new_head(first)
    with torch.no_grad():
        first.lm_head.weight.copy_(head)
    same(torch.tensor([r.effect for r in result.rows if r.stage == "pretrain"]), begun - values(first))


# ---- influence ------------------------------------------------------------------------------------------------------


@support("PEFT", "analysis: influence of an adapter's rows and of rows before it")
def test_influence_of_an_adapters_rows_and_of_rows_before_it(tmp_path: Path) -> None:
    model = record(llama(), tmp_path, "pretrain")
    model = record(adapted(model), tmp_path, "sft", seed=1)
    analyzer = Analyzer(tmp_path / "ledger", model)
    found = analyzer.influence([losses()], recipe="grad_dot")
    assert set(found.examples.stages) == {"pretrain", "sft"}
    assert all((found.scores[:, found.examples.stages == stage] != 0).all() for stage in ("pretrain", "sft"))
    assert not any(p.requires_grad for name, p in model.named_parameters() if "lora" not in name)


@support("PEFT", "analysis: influence of a merged adapter's rows", refused=True)
def test_rows_of_a_merged_adapter_need_the_adapter(tmp_path: Path) -> None:
    model = record(llama(), tmp_path, "pretrain")
    model = merged(record(adapted(model), tmp_path, "sft", seed=1))
    analyzer = Analyzer(tmp_path / "ledger", model)
    assert set(analyzer.influence([losses()], stages=["pretrain"]).examples.stages) == {"pretrain"}
    with pytest.raises(NotComparableError, match=r"rows of stage 'sft' are gradients of 8 weights .*lora_") as caught:
        analyzer.influence([losses()])
    assert "with its adapter" in caught.value.fix


def test_rows_are_compared_on_the_weights_that_are_left(tmp_path: Path) -> None:
    """After the head was replaced: the scores of the trunk's gradients alone."""
    model = record(llama(), tmp_path, "pretrain")
    trunk_only = SketchConfig(rank=4, dtype="float32", correction="none", exclude=("lm_head",))
    other = record(llama(), tmp_path / "trunk", "pretrain", sketch=trunk_only)
    for trained, place in ((model, tmp_path), (other, tmp_path / "trunk")):
        torch.manual_seed(5)
        new_head(trained)
        record(trained, place, "more", seed=1)
    for recipe in ("grad_cos", "grad_dot"):
        found, expected = (
            Analyzer(place / "ledger", trained).influence([losses()], ["pretrain"], recipe)
            for trained, place in ((model, tmp_path), (other, tmp_path / "trunk"))
        )
        torch.testing.assert_close(torch.from_numpy(found.scores), torch.from_numpy(expected.scores))
