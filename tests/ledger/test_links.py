"""Stages find their parent weight by weight where the whole set of weights has changed: heads, frozen parts, merges."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.support import support
from trainer_attrib.errors import ModelMismatchError
from trainer_attrib.ledger.links import Link, describe_merged, describe_weights, find_link
from trainer_attrib.ledger.overview import overview, tree_lines
from trainer_attrib.ledger.reader import Ledger
from trainer_attrib.testing.zoo import HIDDEN, LinearOnThreeAxes, TiedEmbedding


def _link(ledger: Path, stage: str) -> Link:
    return Link.of(Ledger(ledger).stage(stage).meta)


def test_the_same_weights_are_linked_by_their_hash(tmp_path: Path, train: Callable) -> None:
    model = LinearOnThreeAxes()
    train(model, tmp_path, "one")
    train(model, tmp_path, "two")
    assert _link(tmp_path, "one") == Link()
    assert _link(tmp_path, "two") == Link("one", "same")


@support("PEFT", "stages: a head of another shape, a resized vocabulary")
def test_a_replaced_head_is_a_link_with_what_changed(tmp_path: Path, train: Callable, caplog) -> None:
    model = LinearOnThreeAxes()
    train(model, tmp_path, "pretrain")
    model.second = nn.Linear(HIDDEN, 7)
    with caplog.at_level(logging.INFO):
        train(model, tmp_path, "classify")
    assert _link(tmp_path, "classify") == Link(
        "pretrain", "weights added or replaced", reshaped=("second.bias", "second.weight")
    )
    assert "stage 'classify' (continues 'pretrain' (2 weights of another shape))" in caplog.text
    assert Ledger(tmp_path).stage("classify").snapshot("start").keys() == dict(model.named_parameters()).keys()
    found = overview(Ledger(tmp_path))
    assert found["stages"][1]["link"]["reshaped"] == ["second.bias", "second.weight"]
    assert "2 weights of another shape" in tree_lines(found)[2]
    train(model, tmp_path, "further")
    assert _link(tmp_path, "further") == Link("classify", "same")


def test_frozen_and_removed_weights_are_named(tmp_path: Path, train: Callable) -> None:
    model = LinearOnThreeAxes()
    model.aside = nn.Linear(3, 3)
    train(model, tmp_path, "pretrain")
    del model.aside
    model.first.requires_grad_(False)
    train(model, tmp_path, "head")
    assert _link(tmp_path, "head") == Link(
        "pretrain", "weights added or replaced", removed=("aside.bias", "aside.weight"),
        frozen=("first.bias", "first.weight"),
    )  # fmt: skip


@support("PEFT", "stages: a head of another shape, a resized vocabulary")
def test_a_resized_vocabulary_is_a_link(tmp_path: Path, train: Callable) -> None:
    model = TiedEmbedding()
    train(model, tmp_path, "pretrain")
    old = model.embedding.weight.detach()
    model.embedding = nn.Embedding(len(old) + 3, old.shape[1])
    with torch.no_grad():
        model.embedding.weight[: len(old)] = old
    model.head.weight = model.embedding.weight
    train(model, tmp_path, "chat")
    assert _link(tmp_path, "chat").reshaped == ("embedding.weight",)
    assert _link(tmp_path, "chat").parent == "pretrain"


def test_the_stage_that_shares_most_is_the_parent(tmp_path: Path, train: Callable) -> None:
    """The branch that trained the head further, not the trunk's stage from which another head could come as well."""
    model = LinearOnThreeAxes()
    train(model, tmp_path, "trunk")
    model.first.requires_grad_(False)
    train(model, tmp_path, "head")
    model.third = nn.Linear(2, 2)
    train(model, tmp_path, "more")
    assert _link(tmp_path, "more").parent == "head"
    assert _link(tmp_path, "more").added == ("third.bias", "third.weight")
    model.second = nn.Linear(HIDDEN, 7)
    del model.third
    model.requires_grad_(True)
    train(model, tmp_path, "other")
    assert _link(tmp_path, "other").parent == "trunk"  # nothing that 'head' or 'more' trained is left


def test_sharing_an_untouched_base_is_no_parenthood(tmp_path: Path, train: Callable) -> None:
    """Two runs from the same frozen trunk, each with a head of its own."""
    model = LinearOnThreeAxes()
    model.first.requires_grad_(False)
    train(model, tmp_path, "one")
    model.third, model.second = nn.Linear(4, 4), nn.Linear(HIDDEN, 4)
    train(model, tmp_path, "two")
    assert _link(tmp_path, "two").parent is None


def test_weights_changed_outside_are_no_child_and_the_message_says_which(
    tmp_path: Path, train: Callable, caplog
) -> None:
    model = LinearOnThreeAxes()
    train(model, tmp_path, "one")
    with torch.no_grad():
        model.second.weight += 1
    with caplog.at_level(logging.INFO):
        train(model, tmp_path, "two")
    link = _link(tmp_path, "two")
    assert (link.parent, link.kind) == (None, "none")
    assert "1 of 4 weights are not those at the end of 'one' (second.weight)" in link.reason
    assert link.reason in caplog.text


def test_another_shape_without_a_parent_is_another_model(tmp_path: Path, train: Callable) -> None:
    train(LinearOnThreeAxes(), tmp_path, "one")
    model = LinearOnThreeAxes()
    model.second = nn.Linear(HIDDEN, 7)
    with pytest.raises(ModelMismatchError, match=r"second\.bias: recorded \[4\], now \[7\]"):
        train(model, tmp_path, "two")


def test_ledgers_without_fingerprints_of_each_weight_still_open_and_link(tmp_path: Path, train: Callable) -> None:
    model = LinearOnThreeAxes()
    train(model, tmp_path, "one")
    train(model, tmp_path, "two")
    for stage in ("one", "two"):
        (tmp_path / "stages" / stage / "weights.json").unlink()
        path = tmp_path / "stages" / stage / "stage.json"
        meta = json.loads(path.read_text())
        for newer in ("link", "adapters", "low_rank_updates"):
            del meta[newer]
        path.write_text(json.dumps(meta))
    train(model, tmp_path, "three")
    assert [_link(tmp_path, name) for name in ("one", "two", "three")] == [
        Link(), Link("one", "same"), Link("two", "same"),
    ]  # fmt: skip
    assert [s["name"] for s in overview(Ledger(tmp_path))["stages"]] == ["one", "two", "three"]
    assert Ledger(tmp_path).stage("two").problems() == []


@pytest.mark.parametrize("merged_as", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("found_as", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_merged_weights_are_recognized_up_to_the_coarser_rounding(
    merged_as: torch.dtype, found_as: torch.dtype, tmp_path: Path, train: Callable
) -> None:
    model = LinearOnThreeAxes()
    train(model, tmp_path, "one")
    stage = Ledger(tmp_path).stage("one")
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    update = 0.2 * torch.randn_like(weights["first.weight"], dtype=torch.float64)
    base = weights["first.weight"].double()
    path = tmp_path / "stages" / "one" / "weights.json"
    described = json.loads(path.read_text())
    described["merged"] = describe_merged([("first.weight", (base + update).to(merged_as))])
    path.write_text(json.dumps(described))
    for scale, expected in ((1, "one"), (1.5, None), (0.5, None)):
        weights["first.weight"] = (base + scale * update).to(found_as)
        link = find_link([stage], describe_weights(weights), weights)
        assert link.parent == expected
        assert expected is None or (link.kind, link.merged) == ("merged", ("first.weight",))
