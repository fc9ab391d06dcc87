"""Under ``torch.compile`` sketches are as exact as in eager mode, and graphs are as many and as whole as without."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from trainer_attrib.tap import layers
from trainer_attrib.tap.plan import plan_sketch
from trainer_attrib.tap.projections import Projections
from trainer_attrib.tap.record import Record
from trainer_attrib.testing import zoo
from trainer_attrib.testing.oracle import exact_sketches, tap_of, tapped_sketches
from trainer_attrib.types import Layout, SketchConfig

pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # dynamo hides its own
BATCH = 5
DISTINCT = (
    zoo.TiedEmbeddingWithHeadBias,
    zoo.CalledTwice,
    zoo.FrozenHalf,
    zoo.Checkpointed,
    zoo.InPlaceAfterLayer,
    zoo.KeywordInput,
    zoo.TwoForwardsOneBackward,
    zoo.BroadcastPosition,
    zoo.ConvNet,
    zoo.NormsEverywhere,
)


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No compiled code from other tests; norms are registered, for these tests only."""
    monkeypatch.setattr(layers, "_RULES", dict(layers._RULES))
    layers.capture_norms()
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def _graphs() -> int:
    found = counters["stats"]["unique_graphs"]
    counters.clear()
    return found


def _member(kind: type[zoo.Member], rank: int = 4) -> tuple[zoo.Member, Projections]:
    torch.manual_seed(3)
    member = kind().train()
    return member, Projections(plan_sketch(member, SketchConfig(rank=rank, seed=1)), member)


def _inputs(member: zoo.Member, batch: int = BATCH) -> list[zoo.Inputs]:
    return member.inputs(torch.Generator().manual_seed(7), batch)


def _step(member: zoo.Member, called: Any, batch: int = BATCH) -> None:
    torch.manual_seed(0)
    inputs = _inputs(member, batch)
    member.losses([called(**kwargs) for kwargs in inputs], inputs).sum().backward()


def _assert_exact(kind: type[zoo.Member], backend: str, close: Callable) -> None:
    member, projections = _member(kind)
    _step(member, torch.compile(member, backend=backend))
    alone = _graphs()
    torch._dynamo.reset()
    inputs = _inputs(member)
    expected = exact_sketches(member, inputs, projections)
    eager, skipped = tapped_sketches(member, inputs, projections)
    keep = eager.abs().sum(0) > 0
    with tap_of(member, projections) as tap:
        compiled, records, outputs = torch.compile(member, backend=backend), [], []
        torch.manual_seed(0)
        for kwargs in inputs:
            records.append(tap.open(BATCH, Layout.ROWS))
            outputs.append(compiled(**kwargs))
        member.losses(outputs, inputs).sum().backward()
        assert tap.traced
    assert _graphs() == alone
    assert {name for record in records for name in record.skipped} == set(skipped)
    close(torch.stack([record.sketches for record in records]).sum(0)[:, keep], expected[:, keep])


@pytest.mark.parametrize("kind", DISTINCT, ids=lambda kind: kind.__name__)
def test_sketches_are_exact_and_graphs_stay_whole(kind: type[zoo.Member], close: Callable) -> None:
    _assert_exact(kind, "eager", close)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("kind", zoo.MEMBERS, ids=lambda kind: kind.__name__)
def test_the_whole_zoo_on_every_backend(kind: type[zoo.Member], backend: str, close: Callable) -> None:
    if kind is zoo.WithDropout and backend == "inductor":
        pytest.skip("inductor draws other random numbers than the oracle")
    _assert_exact(kind, backend, close)


@pytest.mark.parametrize("layout", Layout)
def test_layouts(layout: Layout, close: Callable) -> None:
    """Pairs of rows, and one example in all rows, are folded as in eager mode; both ways of capture add up."""
    member, projections = _member(zoo.LinearOnThreeAxes)

    def sketches(called: Any) -> torch.Tensor:
        with tap_of(member, projections) as tap:
            record = tap.open(6, layout)
            _step(member, called, 6)
        return record.sketches

    close(sketches(torch.compile(member, backend="aot_eager")), sketches(member), 1e-6)


def test_a_row_is_its_own_examples_gradient_only(close: Callable) -> None:
    member, projections = _member(zoo.BatchEqualsSequence)
    inputs = _inputs(member)
    with tap_of(member, projections) as tap:
        record = tap.open(BATCH, Layout.ROWS)
        outputs = [torch.compile(member, backend="aot_eager")(**kwargs) for kwargs in inputs]
        member.losses(outputs, inputs)[2].backward()
    assert record.sketches[2].norm() > 0
    assert all(record.sketches[row].norm() == 0 for row in (0, 1, 3, 4))


def test_batch_sizes_become_dynamic_as_they_do_without(close: Callable) -> None:
    sizes = (4, 4, 3, 6, 5)
    member, projections = _member(zoo.TiedEmbedding)
    compiled = torch.compile(member, backend="eager")
    for size in sizes:
        _step(member, compiled, size)
    alone = _graphs()
    torch._dynamo.reset()
    with tap_of(member, projections) as tap:
        for size in sizes:
            record = tap.open(size, Layout.ROWS)
            _step(member, compiled, size)
            close(record.sketches, exact_sketches_without_tap(member, size, projections))
    assert _graphs() == alone == 2


def exact_sketches_without_tap(member: zoo.Member, size: int, projections: Projections) -> torch.Tensor:
    """The oracle runs the member itself, whose hooks capture nothing then."""
    return exact_sketches(member, _inputs(member, size), projections)


def test_positions_without_a_batch_axis_are_left_out() -> None:
    """Compiled code cannot look whether they are positions, and says so."""
    member, projections = _member(zoo.PositionsWithoutBatch)
    with tap_of(member, projections) as tap:
        record = tap.open(BATCH, Layout.ROWS)
        _step(member, torch.compile(member, backend="eager"))
    assert set(record.skipped) == {"position"}
    assert "positions" in record.skipped["position"]


def test_several_passes_before_one_backward_keep_to_their_records(close: Callable) -> None:
    member, projections = _member(zoo.LinearOnThreeAxes)
    compiled = torch.compile(member, backend="aot_eager")
    inputs = [_inputs(member), member.inputs(torch.Generator().manual_seed(8), BATCH)]
    with tap_of(member, projections) as tap:
        pairs = [(tap.open(BATCH, Layout.ROWS), compiled(**kwargs[0])) for kwargs in inputs]
        sum(member.losses([output], []).sum() for _, output in pairs).backward()
    for (record, _), kwargs in zip(pairs, inputs, strict=True):
        close(record.sketches, exact_sketches(member, kwargs, projections))


@pytest.mark.parametrize("part", ["first", "second"])
def test_a_part_that_is_compiled_by_itself(part: str, close: Callable) -> None:
    """Eager and compiled layers fill one record; a compiled layer runs its own hooks outside its graph."""
    member, projections = _member(zoo.LinearOnThreeAxes)
    member.get_submodule(part).compile(backend="eager")
    with tap_of(member, projections) as tap:
        record = tap.open(BATCH, Layout.ROWS)
        _step(member, member)
    close(record.sketches, exact_sketches(member, _inputs(member), projections))
    assert record.backwards.keys() == {"first", "second"}


def test_compiled_code_of_one_tap_serves_no_other(close: Callable) -> None:
    member, projections = _member(zoo.BroadcastPosition)
    compiled = torch.compile(member, backend="eager")
    for _ in range(2):
        with tap_of(member, projections) as tap:
            record = tap.open(BATCH, Layout.ROWS)
            _step(member, compiled)
        assert record.sketches.norm() > 0
        assert set(record.skipped) == {"position"}


class _Doubled(nn.Linear):
    pass


def _untraceable(module: nn.Module, x: torch.Tensor, projection_KD: torch.Tensor, bias_K: Any) -> torch.Tensor:
    assert float(x.sum()) != 0.0  # looks at values
    return torch.nn.functional.linear(x, projection_KD, bias_K)


def test_a_rule_that_cannot_be_traced_costs_a_graph_break_and_no_exactness(close: Callable) -> None:
    layers.register_layer(_Doubled, layers.LayerRule(1, _untraceable))
    member = zoo.LinearOnThreeAxes()
    member.second = _Doubled(zoo.HIDDEN, 4)
    projections = Projections(plan_sketch(member, SketchConfig(rank=4)), member)
    with tap_of(member, projections) as tap:
        record: Record = tap.open(BATCH, Layout.ROWS)
        _step(member, torch.compile(member, backend="eager"))
    close(record.sketches, exact_sketches(member, _inputs(member), projections))
    assert _graphs() > 1
