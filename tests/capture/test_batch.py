"""A loop hands over its batch: the rows are the same whatever forward passes go through."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from trainer_attrib.capture.recorder import Recorder
from trainer_attrib.ledger.reader import Ledger
from trainer_attrib.types import SketchConfig

SKETCH = SketchConfig(rank=4, dtype="float32", correction="none")


class Wrapper(nn.Module):
    """Holds the model that is trained, as trainers' modules do."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)


Step = Callable[[Recorder, Wrapper, torch.optim.Optimizer, torch.Tensor], None]


@pytest.fixture
def record(tmp_path: Path) -> Callable[[Step], tuple[list[dict[str, Any]], np.ndarray, Any]]:
    """Trains two steps of four examples and returns rows, unit sketches and the stage."""
    count = iter(range(10))

    def run(step: Step) -> tuple[list[dict[str, Any]], np.ndarray, Any]:
        torch.manual_seed(0)
        model, place = Wrapper().train(), tmp_path / str(next(count))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with Recorder(place, stage="one", model=model, optimizer=optimizer, sketch=SKETCH, strict=True) as recorder:
            for x in torch.randn(2, 4, 5):
                step(recorder, model, optimizer, x)
        assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())
        stage = Ledger(place).stage("one")
        assert max(stage.steps()["audit_residual"].to_pylist()) < 1e-5
        blocks = list(stage.rows())
        return [r for b in blocks for r in b.table.to_pylist()], np.concatenate([b.sketches for b in blocks]), stage

    return run


def _update(optimizer: torch.optim.Optimizer, loss: torch.Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def _plain(recorder: Recorder, model: Wrapper, optimizer: torch.optim.Optimizer, x: torch.Tensor) -> None:
    _update(optimizer, model(x).square().mean())


BATCHES: dict[str, Callable[[torch.Tensor], Any]] = {
    "tensor": lambda x: x,
    "tuple": lambda x: (x, torch.zeros(4)),
    "label first": lambda x: [torch.zeros(4, dtype=torch.long), x],
    "dict": lambda x: {"label": torch.zeros(4), "image": x},
    "nested": lambda x: ({"label": torch.zeros(4)}, [{"image": x}, None], "text", torch.tensor(1.0)),
    "named content": lambda x: {"other": torch.zeros(4, 50), "pixel_values": x},
    "nothing but a call": lambda x: {"not": "a tensor"},
}


@pytest.mark.parametrize("name", BATCHES)
@pytest.mark.parametrize("through", ["model", "submodule"])
def test_the_batch_is_found_in_what_loops_hand_over(name: str, through: str, record: Callable) -> None:
    def step(recorder: Recorder, model: Wrapper, optimizer: torch.optim.Optimizer, x: torch.Tensor) -> None:
        with recorder.batch(content=BATCHES[name](x)):
            called = model if through == "model" or "nothing" in name else model.net
            _update(optimizer, called(x).square().mean())

    (expected, expected_sketches, _), (rows, sketches, _) = record(_plain), record(step)
    assert rows == expected
    np.testing.assert_array_equal(sketches, expected_sketches)


@pytest.mark.parametrize("through", ["model", "submodule"])
def test_several_forward_passes_make_one_row(through: str, record: Callable) -> None:
    """Each example's row is the gradient of all its losses in the batch."""

    def twice(recorder: Recorder, model: Wrapper, optimizer: torch.optim.Optimizer, x: torch.Tensor) -> None:
        with recorder.batch(content=x):
            called = model if through == "model" else model.net
            _update(optimizer, called(x).square().mean() + called(2 * x).square().mean())

    def joined(recorder: Recorder, model: Wrapper, optimizer: torch.optim.Optimizer, x: torch.Tensor) -> None:
        both = model(torch.stack([x, 2 * x], dim=1))  # one forward pass over two positions per example
        _update(optimizer, both[:, 0].square().mean() + both[:, 1].square().mean())

    (rows, sketches, _), (expected, expected_sketches, _) = record(twice), record(joined)
    assert len(rows) == 8
    assert [row["norm"] for row in rows] == pytest.approx([row["norm"] for row in expected], rel=1e-5)
    np.testing.assert_allclose(sketches, expected_sketches, atol=1e-5)


def test_what_follows_a_step_in_the_block_belongs_to_the_next_one(record: Callable) -> None:
    def two_steps(recorder: Recorder, model: Wrapper, optimizer: torch.optim.Optimizer, x: torch.Tensor) -> None:
        with recorder.batch(torch.arange(4), content=x):
            for _ in range(2):
                _update(optimizer, model.net(x).square().mean())

    def two_blocks(recorder: Recorder, model: Wrapper, optimizer: torch.optim.Optimizer, x: torch.Tensor) -> None:
        for _ in range(2):
            with recorder.batch(["0", "1", "2", "3"]):
                _plain(recorder, model, optimizer, x)

    (rows, sketches, _), (expected, expected_sketches, _) = record(two_steps), record(two_blocks)
    assert rows == expected
    assert [row["step"] for row in rows[::4]] == [1, 2, 3, 4]
    np.testing.assert_array_equal(sketches, expected_sketches)


def test_nothing_is_recorded_after_the_block(record: Callable) -> None:
    """A penalty computed by a submodule between two batches is not the last batch's."""

    def stray(recorder: Recorder, model: Wrapper, optimizer: torch.optim.Optimizer, x: torch.Tensor) -> None:
        with recorder.batch(content=x):
            loss = model.net(x).square().mean()
        ignored = model.net(x.flip(0)).sum()
        ignored.backward()
        _update(optimizer, loss)

    (rows, sketches, _), (expected, expected_sketches, _) = record(stray), record(_plain)
    assert rows == expected
    np.testing.assert_array_equal(sketches, expected_sketches)


def test_a_loop_over_submodules_is_told_what_to_do(tmp_path: Path, caplog: Any) -> None:
    model = Wrapper().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Recorder(tmp_path, stage="one", model=model, optimizer=optimizer):
        _update(optimizer, model.net(torch.randn(4, 5)).square().mean())
    assert "recorder.batch(content=batch)" in caplog.text
