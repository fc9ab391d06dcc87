"""Recording a compiled model: the same rows, the same graphs, the same training; begun late; nothing left behind."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters

from tests.support import support
from trainer_attrib.analysis.behavior import Behavior
from trainer_attrib.analysis.query_sketches import sketch_queries
from trainer_attrib.capture.recorder import Recorder
from trainer_attrib.ledger.reader import Ledger
from trainer_attrib.tap import layers
from trainer_attrib.testing import zoo
from trainer_attrib.types import SketchConfig

pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # dynamo hides its own
SKETCH = SketchConfig(rank=4, dtype="float32")


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """No compiled code from other tests."""
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def _graphs() -> int:
    found = counters["stats"]["unique_graphs"]
    counters.clear()
    return found


def _member(*, compiled: bool, kind: type[zoo.Member] = zoo.TiedEmbedding) -> Any:
    torch._dynamo.reset()
    torch.manual_seed(0)
    member = kind()
    if compiled:
        member.compile(backend="aot_eager")
    return member


def _rows(ledger: Path) -> dict[tuple[int, str], np.ndarray]:
    found = {}
    for block in Ledger(ledger).stage("one").rows():
        for row, sketch in zip(block.table.to_pylist(), block.sketches, strict=True):
            found[row["step"], row["example"]] = sketch * row["norm"]
    return found


@support("Precision and compilation", "torch.compile: `model.compile()` in a plain loop")
def test_rows_graphs_and_training_are_as_without(train: Callable, tmp_path: Path, close: Callable) -> None:
    """Two micro-batches per step, clipping, second moments folded in on the way."""
    settings: dict[str, Any] = {"steps": 4, "accumulate": 2, "clip": 0.5}
    alone = train(_member(compiled=True), **settings)
    graphs = _graphs()
    recorded = train(_member(compiled=True), tmp_path / "compiled", sketch=SKETCH, strict=True, **settings)
    assert _graphs() == graphs == 1
    assert all(torch.equal(a, b) for a, b in zip(alone.losses, recorded.losses, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(alone.model.parameters(), recorded.model.parameters(), strict=True))
    train(_member(compiled=False), tmp_path / "eager", sketch=SKETCH, strict=True, **settings)
    found, expected = _rows(tmp_path / "compiled"), _rows(tmp_path / "eager")
    assert found.keys() == expected.keys()
    assert len(found) == 4 * 2 * 4
    close(*(torch.from_numpy(np.stack([rows[key] for key in expected])) for rows in (found, expected)))
    stages = [Ledger(tmp_path / name).stage("one") for name in ("compiled", "eager")]
    assert stages[0].meta["coverage"] == stages[1].meta["coverage"]
    assert max(step["audit_residual"] for step in stages[0].steps().to_pylist()) < 1e-5


def _step(model: Any, called: Callable, optimizer: torch.optim.Optimizer) -> None:
    inputs = model.inputs(torch.Generator().manual_seed(0), 4)
    model.losses([called(**kwargs) for kwargs in inputs], inputs).mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def _hooks(model: torch.nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_recording_begun_after_the_first_compiled_call(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Only the first step is lost, which is said; afterwards the code from before is valid again."""
    model = _member(compiled=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    _step(model, model, optimizer)
    with Recorder(tmp_path / "ledger", stage="one", model=model, optimizer=optimizer, strict=True):
        for _ in range(3):
            _step(model, model, optimizer)
    assert "compiled and run before recording began" in caplog.text
    assert [step["rows"] for step in Ledger(tmp_path / "ledger").stage("one").steps().to_pylist()] == [0, 4, 4]
    assert _graphs() == 2
    _step(model, model, optimizer)
    assert _graphs() == 0
    assert _hooks(model) == 0
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_stages_in_one_process_and_what_lies_between(tmp_path: Path) -> None:
    """A finished stage leaves no capture in compiled or eager passes, and the next one is recorded from its start."""
    model = _member(compiled=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for stage in ("one", "two"):
        with Recorder(tmp_path / "ledger", stage=stage, model=model, optimizer=optimizer, strict=True) as recorder:
            _step(model, model, optimizer)
            _step(model, model.forward, optimizer)
        if stage == "one":
            _step(model, model.forward, optimizer)
        assert _hooks(model) == 0
        steps = Ledger(tmp_path / "ledger").stage(stage).steps().to_pylist()
        assert [step["rows"] for step in steps] == [4, 0]
        assert recorder.fault is None


@support("Precision and compilation", "torch.compile: `torch.compile(model)` in a plain loop")
@pytest.mark.parametrize("order", ["before", "after"])
def test_a_wrapper_made_before_or_after_recording_began(order: str, tmp_path: Path) -> None:
    model = _member(compiled=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    called = torch.compile(model, backend="eager") if order == "before" else model
    with Recorder(tmp_path / "ledger", stage="one", model=called, optimizer=optimizer, strict=True, sketch=SKETCH):
        called = torch.compile(model, backend="eager") if order == "after" else called
        _step(model, called, optimizer)
        _step(model, called, optimizer)
    stage = Ledger(tmp_path / "ledger").stage("one")
    assert [step["rows"] for step in stage.steps().to_pylist()] == [4, 4]
    assert set(stage.meta["coverage"]["partial"]) == set()
    assert _graphs() == 1


@support("Precision and compilation", "torch.compile: a function that calls the model, with `batch(content=...)`")
def test_a_compiled_function_that_calls_the_model(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Its passes cannot be told from inside the graph, so the loop says what the batch is, or is told to."""

    def recorded(stage: str, *, told: bool) -> list[int]:
        model = _member(compiled=False, kind=zoo.PlainLinear)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

        @torch.compile(backend="eager", fullgraph=True)
        def loss_of(x: torch.Tensor) -> torch.Tensor:
            return model(x=x).pow(2).mean()

        with Recorder(tmp_path / "ledger", stage=stage, model=model, optimizer=optimizer, strict=True) as recorder:
            for _ in range(2):
                x = torch.randn(5, zoo.WIDTH)
                with recorder.batch(content=x if told else None):
                    loss_of(x).backward()
                optimizer.step()
                optimizer.zero_grad()
        return [step["rows"] for step in Ledger(tmp_path / "ledger").stage(stage).steps().to_pylist()]

    assert recorded("told", told=True) == [5, 5]
    assert recorded("untold", told=False) == [0, 0]
    assert "recorder.batch(content=batch)" in caplog.text


def _faulty(*arguments: Any) -> torch.Tensor:
    raise RuntimeError("a rule that fails")


def test_a_rule_that_fails_ends_capture_and_not_training(
    train: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    alone = train(_member(compiled=True), steps=3)
    monkeypatch.setattr(layers, "_RULES", dict(layers._RULES))
    layers.register_layer(torch.nn.Linear, layers.LayerRule(1, _faulty))
    recorded = train(_member(compiled=True), tmp_path / "ledger", steps=3)
    assert all(torch.equal(a, b) for a, b in zip(alone.losses, recorded.losses, strict=True))
    assert "a rule that fails" in caplog.text
    assert Ledger(tmp_path / "ledger").stage("one").meta["status"] == "incomplete"
    assert _hooks(recorded.model) == 0


def test_queries_of_a_compiled_model_are_those_of_the_model(train: Callable, tmp_path: Path, close: Callable) -> None:
    """A query is differentiated without ``backward``, for which compiled code would give no sketch."""
    model = train(_member(compiled=True), tmp_path / "ledger", steps=2, sketch=SKETCH).model
    tokens = torch.tensor([3, 4, 5, 6, 7, 8])
    behavior = Behavior("logits", [tokens], lambda called, batch: called(tokens=torch.stack(batch)).tanh().sum((1, 2)))
    stage = Ledger(tmp_path / "ledger").stage("one")
    found = sketch_queries(model, stage, 0, [behavior])
    model._compiled_call_impl = None
    close(found, sketch_queries(model, stage, 0, [behavior]))
