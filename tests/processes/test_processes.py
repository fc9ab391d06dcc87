"""Two processes that train one model record what one process would have recorded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.processes.conftest import ACCELERATE
from tests.support import support
from trainer_attrib.ledger.reader import Ledger, StageReader

HERE = Path(__file__).parent
AREA = "Many processes"


def stage_of(ledger: Path) -> StageReader:
    return Ledger(ledger).stage("one")


def rows_of(stage: StageReader) -> dict[tuple[int, str], dict[str, Any]]:
    """(step, example) -> its row, with the gradient's sketch."""
    found = {}
    for block in stage.rows():
        for row, unit in zip(block.table.to_pylist(), block.sketches, strict=True):
            found[row["step"], row["example"]] = row | {"sketch": unit.astype(np.float64) * row["norm"]}
    return found


def assert_same_recording(several: StageReader, alone: StageReader) -> None:
    """The rows and the steps of the one are those of the other, up to the order in which floats were added."""
    found, expected = rows_of(several), rows_of(alone)
    assert found.keys() == expected.keys()
    assert len(expected) > 20
    # float16 rows: rounding to the last bit differs where the values do by one bit of float32
    nearly = 1e-5 if several.meta["sketch"]["dtype"] == "float32" else 1e-3
    for key, row in expected.items():
        assert found[key]["norm"] == pytest.approx(row["norm"], rel=1e-5)
        assert np.linalg.norm(found[key]["sketch"] - row["sketch"]) < nearly * row["norm"]
        assert {found[key][n] for n in ("version", "complete")} == {row[n] for n in ("version", "complete")}
    assert {row["rank"] for row in found.values()} == {0, 1}
    ours, theirs = several.steps().to_pylist(), alone.steps().to_pylist()
    assert len(ours) == len(theirs) == several.count("steps")
    for one, other in zip(ours, theirs, strict=True):
        for name in ("loss", "gradient_norm"):
            assert one[name] == pytest.approx(other[name], rel=1e-5)
        for name in ("step", "rows", "learning_rate", "weight_decay", "beta1", "beta2", "version", "audit_weight"):
            assert one[name] == other[name], name
        updates = [np.frombuffer(row["projected_weights"], np.float32) for row in (one, other)]
        np.testing.assert_allclose(*updates, atol=1e-5)
        assert one["audit_residual"] < 1e-5
        assert other["audit_residual"] < 1e-5
    assert several.examples().sort_by("example").column("example") == alone.examples().sort_by("example").column(
        "example"
    )


def assert_same_weights(found: Path, expected: Path) -> None:
    found, expected = load_file(found), load_file(expected)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, atol=1e-5)


@pytest.fixture(scope="module")
def alone(launch: Callable, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The plain loop in one process."""
    folder = tmp_path_factory.mktemp("alone")
    launch(HERE / "train.py", "alone", folder / "ledger", folder / "weights")
    return folder


@pytest.mark.parametrize(
    "how",
    [
        pytest.param("ddp", marks=support(AREA, "DistributedDataParallel, gloo, 2 processes, plain loop")),
        pytest.param("fsdp", marks=support(AREA, "FSDP2 (fully_shard), gloo, 2 processes, plain loop")),
    ],
)
def test_a_plain_loop(how: str, launch: Callable, alone: Path, tmp_path: Path) -> None:
    said = launch(HERE / "train.py", how, tmp_path / "ledger", tmp_path / "weights", processes=2)
    stage = stage_of(tmp_path / "ledger")
    assert stage.meta["sketch"]["dtype"] == "float32"
    assert_same_recording(stage, stage_of(alone / "ledger"))
    assert_same_weights(tmp_path / "weights", alone / "weights")
    assert said.count("3 of 3 layers fired; rows cover 100.0%") == 1, "one process speaks"
    assert all(step["audit_scale"] == pytest.approx(0.5, rel=1e-4) for step in stage.steps().to_pylist())
    assert stage.meta["status"] == "complete"
    assert stage.meta["sharded"] == (how == "fsdp")
    assert not stage.problems()
    start, end = stage.snapshot("start"), stage.snapshot("end")
    assert {name: tuple(value.shape) for name, value in end.items()} == {
        name: tuple(value.shape) for name, value in stage_of(alone / "ledger").snapshot("end").items()
    }
    weights = load_file(tmp_path / "weights")
    for name, value in end.items():
        np.testing.assert_array_equal(value.numpy(), weights[name])
        assert not np.array_equal(start[name].numpy(), weights[name])
    assert stage.meta["weights"]["start"] == stage_of(alone / "ledger").meta["weights"]["start"]
    for version in (1, 2):
        theirs = stage_of(alone / "ledger").factors(version)
        for name, sides in stage.factors(version).items():
            for ours, side in zip(sides, theirs[name], strict=True):
                np.testing.assert_allclose(ours.numpy(), side.numpy(), rtol=1e-4)


@pytest.mark.parametrize(("fault", "how"), [("first", "fsdp"), ("write", "fsdp"), ("disk", "ddp")])
def test_a_fault_in_one_process_ends_no_training(
    fault: str, how: str, launch: Callable, alone: Path, tmp_path: Path
) -> None:
    said = launch(HERE / "train.py", how, tmp_path / "ledger", tmp_path / "weights", fault, processes=2)
    assert "injected" in said
    assert_same_weights(tmp_path / "weights", alone / "weights")
    stage = stage_of(tmp_path / "ledger")
    assert stage.meta["status"] == "incomplete"
    assert stage.meta["weights"]["end"], "children find the stage all the same"
    assert not stage.problems()
    if fault != "first":
        assert stage.count("rows") > 0
        assert all(key in rows_of(stage_of(alone / "ledger")) for key in rows_of(stage))


@support(AREA, "transformers.Trainer under torchrun (DDP)")
def test_the_hugging_face_trainer(launch: Callable, tmp_path: Path) -> None:
    for processes, name in ((1, "one"), (2, "two")):
        launch(HERE / "train_hf.py", tmp_path / name, tmp_path / f"{name}.weights", "24", processes=processes)
    assert_same_recording(stage_of(tmp_path / "two"), stage_of(tmp_path / "one"))
    assert_same_weights(tmp_path / "two.weights", tmp_path / "one.weights")


@support(AREA, "examples repeated by even_batches: one example, each contribution a row")
def test_examples_that_even_batches_repeats(launch: Callable, tmp_path: Path) -> None:
    """22 examples, 4 at a time: one process's last batch of an epoch is filled with two examples from its start."""
    launch(HERE / "train_hf.py", tmp_path / "ledger", tmp_path / "weights", "22", processes=2)
    stage = stage_of(tmp_path / "ledger")
    assert sorted(stage.examples()["example"].to_pylist()) == sorted(f"row-{i}" for i in range(22))
    assert stage.count("examples") == 22
    seen = Counter(row["example"] for block in stage.rows() for row in block.table.to_pylist())
    assert sum(seen.values()) == 2 * 24
    assert set(seen.values()) == {2, 3} or set(seen.values()) == {2, 4}
    assert all(step["audit_residual"] < 1e-5 for step in stage.steps().to_pylist()), "the repeated ones did train"


@support(AREA, "Lightning, strategy='ddp', 2 processes")
def test_lightning(launch: Callable, tmp_path: Path) -> None:
    for processes, name in ((1, "one"), (2, "two")):
        launch(HERE / "train_lightning.py", tmp_path / name, tmp_path / f"{name}.weights", processes=processes)
    assert_same_recording(stage_of(tmp_path / "two"), stage_of(tmp_path / "one"))
    assert_same_weights(tmp_path / "two.weights", tmp_path / "one.weights")


@support(AREA, "accelerate launch: Accelerator's loop with accumulate and clipping, 2 processes")
def test_accelerate(launch: Callable, tmp_path: Path) -> None:
    for processes, name in ((1, "one"), (2, "two")):
        where = tmp_path / name, tmp_path / f"{name}.weights"
        launch(HERE / "train_accelerate.py", *where, processes=processes, launcher=ACCELERATE)
    assert_same_recording(stage_of(tmp_path / "two"), stage_of(tmp_path / "one"))
    assert_same_weights(tmp_path / "two.weights", tmp_path / "one.weights")
