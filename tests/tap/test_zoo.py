"""Captured sketches are the projections of autograd's per-example gradients, whatever the module does."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from tests.support import support
from trainer_attrib.numerics.second_moment import factor, inverse_root
from trainer_attrib.tap import layers
from trainer_attrib.tap.plan import plan_sketch
from trainer_attrib.tap.projections import Projections
from trainer_attrib.testing.oracle import (
    exact_sketches,
    example_gradients,
    project_gradient,
    tap_of,
    tapped_sketches,
    whole_weight,
)
from trainer_attrib.testing.zoo import (
    MEMBERS,
    BroadcastPosition,
    CalledTwice,
    Checkpointed,
    CheckpointedReentrant,
    ConvNet,
    InPlaceAfterLayer,
    LinearOnThreeAxes,
    Member,
    NormsEverywhere,
    PaddedBatch,
    PlainLinear,
    PositionsWithoutBatch,
    TiedEmbedding,
    TiedEmbeddingWithHeadBias,
    TwoForwardsOneBackward,
)
from trainer_attrib.types import Layout, SketchConfig

BATCH = 5
PROVES = {
    PlainLinear: support("Layers", "Linear, with its bias"),
    LinearOnThreeAxes: support("Layers", "Linear, with its bias"),
    PaddedBatch: support("Layers", "Embedding"),
    TiedEmbedding: support("Layers", "Embedding tied to the head"),
    TiedEmbeddingWithHeadBias: support("Layers", "Embedding tied to the head"),
    CalledTwice: support("Layers", "a layer called several times per pass"),
    TwoForwardsOneBackward: support("Layers", "several forward passes before one backward pass"),
    ConvNet: support("Layers", "Conv1d, Conv2d"),
    NormsEverywhere: support("Layers", "LayerNorm and RMSNorm, after `capture_norms()`"),
    Checkpointed: support("Precision and compilation", "gradient checkpointing, not reentrant"),
    CheckpointedReentrant: support("Precision and compilation", "gradient checkpointing, reentrant"),
    InPlaceAfterLayer: support("Precision and compilation", "in-place operations after a layer"),
}
zoo = pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=PROVES.get(kind, ()), id=kind.__name__) for kind in MEMBERS]
)


@pytest.fixture(autouse=True)
def norms(monkeypatch: pytest.MonkeyPatch) -> None:
    """Norms are registered, for these tests only."""
    monkeypatch.setattr(layers, "_RULES", dict(layers._RULES))
    layers.capture_norms()


def _member(kind: type[Member], rank: int = 4) -> tuple[Member, Projections]:
    torch.manual_seed(3)
    member = kind().train()
    return member, Projections(plan_sketch(member, SketchConfig(rank=rank, seed=1)), member)


def _inputs(member: Member, batch: int = BATCH) -> list[dict[str, torch.Tensor]]:
    return member.inputs(torch.Generator().manual_seed(7), batch)


def _columns(member: Member, projections: Projections) -> torch.Tensor:
    """Which columns of a row belong to weights that can be captured."""
    keep = torch.ones(projections.plan.width, dtype=torch.bool)
    for weight in projections.plan.weights:
        keep[weight.span] = weight.name not in member.left_out
    return keep


@zoo
@pytest.mark.parametrize("rank", [4, 64], ids=["rank4", "identity"])
def test_sketches_equal_projected_gradients(kind: type[Member], rank: int, dtype: torch.dtype, close: Callable) -> None:
    member, projections = _member(kind, rank)
    inputs = _inputs(member)
    found, _ = tapped_sketches(member, inputs, projections)
    keep = _columns(member, projections)
    close(found[:, keep], exact_sketches(member, inputs, projections)[:, keep])


@zoo
def test_a_row_is_its_own_examples_gradient_only(kind: type[Member], float64: None, close: Callable) -> None:
    """Backpropagating one example's loss fills its row and no other: no axis is mistaken for the batch."""
    member, projections = _member(kind)
    inputs, example = _inputs(member), 2
    with tap_of(member, projections) as tap:
        torch.manual_seed(0)
        records, outputs = [], []
        for kwargs in inputs:
            records.append(tap.open(BATCH, Layout.ROWS))
            outputs.append(member(**kwargs))
        member.losses(outputs, inputs)[example].backward()
    found = torch.stack([record.sketches for record in records]).sum(0)[:, _columns(member, projections)]
    others = [row for row in range(BATCH) if row != example]
    assert not found[others].any()
    close(found[example], exact_sketches(member, inputs, projections)[example][_columns(member, projections)])


@zoo
def test_gradients_are_bit_identical_under_the_tap(kind: type[Member]) -> None:
    member, projections = _member(kind)
    inputs = _inputs(member)
    tapped_sketches(member, inputs, projections)
    tapped = {name: p.grad.clone() for name, p in member.named_parameters() if p.grad is not None}
    member.zero_grad()
    torch.manual_seed(0)
    member.losses([member(**kwargs) for kwargs in inputs], inputs).sum().backward()
    plain = {name: p.grad for name, p in member.named_parameters() if p.grad is not None}
    assert tapped.keys() == plain.keys()
    assert all(torch.equal(tapped[name], plain[name]) for name in plain)


@zoo
def test_detaching_leaves_no_hook(kind: type[Member]) -> None:
    member, projections = _member(kind)
    with tap_of(member, projections):
        assert any(module._forward_hooks for module in member.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in member.modules())


@zoo
def test_folded_second_moments_scale_the_exact_gradient(kind: type[Member], float64: None, close: Callable) -> None:
    """With factors folded in, a row is the raw projection of unit * diag(a) G diag(b), 1/sqrt(V) ~ a b^T."""
    member, raw = _member(kind)
    inputs = _inputs(member)
    moments = {w.name: torch.rand(w.rows, w.columns).square() + 1e-3 for w in raw.plan.weights}
    factors = {name: factor(moment) for name, moment in moments.items()}
    folded = Projections(raw.plan, member, factors, version=1)
    found, _ = tapped_sketches(member, inputs, folded)

    def losses_of() -> torch.Tensor:
        return member.losses([member(**kwargs) for kwargs in inputs], inputs)

    rows = []
    for gradients in example_gradients(member, losses_of):
        parts = []
        for weight in raw.plan.weights:
            a, b = inverse_root(*factors[weight.name])
            scaled = folded.unit * a[:, None] * whole_weight(weight, gradients) * b
            parts.append((raw[weight.name].left @ scaled @ raw[weight.name].right.T).flatten())
        rows.append(torch.cat(parts))
    keep = _columns(member, raw)
    close(found[:, keep], torch.stack(rows)[:, keep])


@pytest.mark.parametrize(
    ("kind", "why"),
    [(BroadcastPosition, "does not start with the batch"), (PositionsWithoutBatch, "counts positions")],
    ids=["broadcast", "without-batch"],
)
@support("Layers", "positions looked up once for the whole batch", refused=True)
def test_positions_are_skipped_with_a_reason(kind: type[Member], why: str) -> None:
    member, projections = _member(kind)
    found, skipped = tapped_sketches(member, _inputs(member), projections)
    position = next(w for w in projections.plan.weights if w.name == "position.weight")
    assert list(skipped) == ["position"]
    assert why in skipped["position"]
    assert not found[:, position.span].any()


@support("Layers", "a bias of its own on a tied head", refused=True)
def test_bias_of_a_tied_head_is_reported_as_not_covered() -> None:
    member, projections = _member(TiedEmbeddingWithHeadBias)
    assert list(projections.plan.uncovered) == ["head.bias"]
    assert member.head.bias.requires_grad


def test_pairs_fold_both_sides_into_one_row(float64: None, close: Callable) -> None:
    member, projections = _member(LinearOnThreeAxes)
    inputs = _inputs(member, batch=6)
    with tap_of(member, projections) as tap:
        record = tap.open(6, Layout.PAIRS)
        member.losses([member(**inputs[0])], inputs).sum().backward()
    exact = exact_sketches(member, inputs, projections)
    close(record.sketches, exact[:3] + exact[3:])


def test_one_query_takes_every_row(float64: None, close: Callable) -> None:
    member, projections = _member(LinearOnThreeAxes)
    inputs = _inputs(member)
    with tap_of(member, projections) as tap:
        record = tap.open(1, Layout.ONE)
        member.losses([member(**inputs[0])], inputs).sum().backward()
    close(record.sketches, exact_sketches(member, inputs, projections).sum(0, keepdim=True))


@support("Layers", "Conv1D of transformers")
def test_gpt2_sketches_equal_projected_gradients(
    tiny_gpt2: Callable, token_rows: Callable, pad_collator: Callable, dtype: torch.dtype, close: Callable
) -> None:
    """HF Conv1D stores its weight transposed, the head is tied, positions are broadcast."""
    model = tiny_gpt2().to(dtype).train()
    projections = Projections(plan_sketch(model, SketchConfig(rank=4)), model)
    batch = pad_collator()(token_rows(4))

    def losses_of() -> torch.Tensor:
        logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1].transpose(1, 2)
        return torch.nn.functional.cross_entropy(logits, batch["labels"][:, 1:], reduction="none").sum(1)

    with tap_of(model, projections) as tap:
        record = tap.open(4, Layout.ROWS)
        losses_of().sum().backward()
    exact = torch.stack(
        [project_gradient(projections.plan, projections, g) for g in example_gradients(model, losses_of)]
    )
    keep = torch.ones(projections.plan.width, dtype=torch.bool)
    keep[next(w.span for w in projections.plan.weights if w.name == "transformer.wpe.weight")] = False
    assert list(record.skipped) == ["transformer.wpe"]
    close(record.sketches[:, keep], exact[:, keep])
