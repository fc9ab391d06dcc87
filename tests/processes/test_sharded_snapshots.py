"""Every process stores its part of a snapshot; readers, on any number of processes, see one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import trainer_attrib as ta
from tests.processes.train_shards import BATCH, STEPS, Uneven, data, stage
from tests.support import support
from trainer_attrib.errors import CorruptPartError, LedgerFormatError, LedgerNotFoundError
from trainer_attrib.ledger.links import describe_weights, sample, sampled
from trainer_attrib.ledger.reader import Ledger, StageReader

HERE = Path(__file__).parent
AREA = "Many processes"


@pytest.fixture(scope="module")
def recorded(launch: Callable, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stage `zero` in this process, those after it under FSDP2 in two, and their weights as the training itself puts
    them together."""
    folder = tmp_path_factory.mktemp("shards")
    torch.manual_seed(0)
    model = Uneven()
    stage("zero", str(folder / "ledger"), model, torch.optim.AdamW(model.parameters(), lr=1e-2))
    save_file(dict(model.named_parameters()), folder / "zero-end.safetensors")
    launch(HERE / "train_shards.py", folder / "ledger", folder, processes=2)
    return folder


@pytest.fixture
def copy(recorded: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(recorded / "ledger", tmp_path / "ledger"))


def loss_of(model: nn.Module, step: int) -> Tensor:
    """Of the whole batch of a step."""
    tokens, labels = data()
    batch = slice(step * BATCH, (step + 1) * BATCH)
    return nn.functional.cross_entropy(model(tokens[batch]), labels[batch])


def stage_of(ledger: Path, name: str = "one") -> StageReader:
    return Ledger(ledger).stage(name)


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def model_at(recorded: Path, name: str) -> nn.Module:
    model = Uneven()
    model.load_state_dict(load_file(recorded / f"{name}.safetensors") | {"seen": torch.tensor(0.0)})
    return model


@support(AREA, "FSDP2: every process stores its part of a snapshot; rows that do not divide, unsharded parameters")
def test_the_parts_are_one_snapshot(recorded: Path) -> None:
    for name in ("one", "two"):
        found = stage_of(recorded / "ledger", name)
        assert_equal(found.snapshot("end"), load_file(recorded / f"{name}-end.safetensors"))
        assert not found.problems()
    first, apart = stage_of(recorded / "ledger"), stage_of(recorded / "ledger", "apart")
    assert_equal(first.snapshot("start"), load_file(recorded / "one-start.safetensors"))
    assert apart.parent is None
    assert_equal(apart.snapshot("start"), load_file(recorded / "apart-start.safetensors"))
    assert len([*(recorded / "ledger/stages/apart/snapshots").glob("start.rank-000[01].safetensors")]) == 2
    middle, end = first.snapshot("mid-1"), first.snapshot("end")
    assert first.snapshot_step("mid-1") == STEPS // 2
    assert all(middle[name].shape == end[name].shape and not torch.equal(middle[name], end[name]) for name in end)
    folder = recorded / "ledger/stages/one"
    held = [load_file(folder / f"snapshots/end.rank-000{rank}.safetensors") for rank in (0, 1)]
    assert "replicated.weight" in held[0]
    assert "replicated.weight" not in held[1]
    for name, value in end.items():
        rows = [len(part[name]) for part in held if name in part]
        assert sum(rows) == len(value)
        assert len(rows) == 2 or name.startswith(("gate.", "replicated."))
    assert first.buffers("end") == {"seen": torch.tensor(float(STEPS))}
    assert not (folder / "snapshots/end.buffers.rank-0001.safetensors").exists(), "of what all hold, one stores it"
    assert first.bytes == sum(path.stat().st_size for path in folder.glob("*/*"))


@support(AREA, "FSDP2: second moments at snapshots, optimizer state that a stage brings along")
def test_what_is_beside_the_weights_is_sharded_too(recorded: Path) -> None:
    kept = load_file(recorded / "one-end.moments.safetensors")
    found = stage_of(recorded / "ledger").moments("end")
    assert found.keys() == kept.keys() == stage_of(recorded / "ledger").snapshot("end").keys()
    for name, value in kept.items():
        torch.testing.assert_close(found[name], value / (1 - 0.999**STEPS), rtol=1e-5, atol=0)
    second = stage_of(recorded / "ledger", "two")
    state = second.optimizer_state()[0]
    assert second.meta["optimizer_state_left_out"] == []
    assert_equal({name: state[name]["exp_avg_sq"] for name in kept}, kept)
    assert {float(entries["step"]) for entries in state.values()} == {STEPS}
    assert stage_of(recorded / "ledger").optimizer_state() == {}


@support(AREA, "FSDP2: a stage that broke off is gone on with")
def test_a_stage_that_broke_off_goes_on(recorded: Path) -> None:
    found = stage_of(recorded / "ledger", "two")
    assert found.meta["status"] == "complete"
    assert [attempt["after_step"] for attempt in found.meta["resumed"]] == [4]
    assert "lost" not in found.meta["resumed"][0]
    assert found.steps()["step"].to_pylist() == [*range(1, STEPS + 1)]
    assert found.count("rows") == STEPS * BATCH
    assert [entry["name"] for entry in found.meta["snapshots"]] == ["start", "mid-1", "end"]


def test_parameters_that_are_not_sharded_are_told_of_once(recorded: Path) -> None:
    """Beside the same training in one process, up to the order in which floats were added."""
    alone = Uneven()
    alone.load_state_dict(load_file(recorded / "one-start.safetensors") | {"seen": torch.tensor(0.0)})
    stage("alone", str(recorded / "alone"), alone, torch.optim.AdamW(alone.parameters(), lr=1e-2))
    found, expected = stage_of(recorded / "ledger"), stage_of(recorded / "alone", "alone")
    for ours, theirs in zip(found.steps().to_pylist(), expected.steps().to_pylist(), strict=True):
        assert ours["gradient_norm"] == pytest.approx(theirs["gradient_norm"], rel=1e-5)
        assert ours["audit_residual"] < 1e-5
        assert ours["audit_scale"] == pytest.approx(0.5, rel=1e-4)
        updates = [np.frombuffer(row["projected_weights"], np.float32) for row in (ours, theirs)]
        np.testing.assert_allclose(*updates, atol=1e-5)
    for name, sides in expected.factors(1).items():
        for ours, side in zip(found.factors(1)[name], sides, strict=True):
            np.testing.assert_allclose(ours.numpy(), side.numpy(), rtol=1e-4)
    assert found.meta["coverage"]["share"] == expected.meta["coverage"]["share"] == 1.0


def test_weights_have_the_hash_that_they_have_in_one_process(recorded: Path) -> None:
    for name in ("zero", "one", "two", "apart"):
        expected = describe_weights(load_file(recorded / f"{name}-end.safetensors"))
        assert stage_of(recorded / "ledger", name).weights_at("end") == expected
    for entries in (1, 63, 64, 65, 1000):
        weight = torch.arange(entries)
        assert torch.equal(sample(weight), weight[sampled(entries)])
        assert torch.equal(sample(sample(weight)), sample(weight))


def test_a_start_is_the_end_of_its_parent_stored_once(recorded: Path, copy: Path) -> None:
    """Also where only the parent or only the child trains in one process: here, in this one."""
    model = model_at(recorded, "two-end")
    stage("three", str(copy), model, torch.optim.AdamW(model.parameters(), lr=1e-2))
    for name, parent in (("one", "zero"), ("two", "one"), ("three", "two")):
        child = stage_of(copy, name)
        assert child.parent == parent
        assert child.meta["format"] == 2, "a version that knows no shards must refuse the stage"
        assert child.snapshot_entry("start")["stored_in"] == [parent, "end"]
        assert not list((copy / f"stages/{name}/snapshots").glob("start.safetensors"))
        assert not list((copy / f"stages/{name}/snapshots").glob("start.rank-*.safetensors"))
        assert_equal(child.snapshot("start"), load_file(recorded / f"{parent}-end.safetensors"))
        assert not child.problems()


def test_the_analyzer_answers_in_one_process(recorded: Path) -> None:
    model = model_at(recorded, "two-end")
    analyzer = ta.Analyzer(recorded / "ledger", model)
    tokens, labels = data()

    items = [{"tokens": tokens[i], "label": labels[i]} for i in range(3)]

    def right(model: nn.Module, batch: list[dict[str, Tensor]]) -> Tensor:
        logits = model(torch.stack([item["tokens"] for item in batch]))
        return -nn.functional.cross_entropy(logits, torch.stack([item["label"] for item in batch]), reduction="none")

    behavior = ta.Behavior("right", items, right)
    effects = analyzer.stage_effects([behavior], method="change")
    assert {row["stage"] for row in effects.to_table().to_pylist()} == {"zero", "one", "two"}
    programs = dict.fromkeys(("one", "two"), lambda model: [lambda s=s: loss_of(model, s) for s in range(STEPS)])
    propagated = analyzer.stage_effects([behavior], method="propagate", programs=programs).to_table().to_pylist()
    assert {row["stage"] for row in propagated if np.isfinite(row["effect"])} == {"zero", "one", "two"}
    influence = analyzer.influence([behavior], stages=["one"])
    folded_in = range(4 * BATCH, STEPS * BATCH)  # rows before the second moments are left out beside later ones
    assert {*influence.examples.ids} == {f"example-{i}" for i in folded_in}


@pytest.mark.parametrize("rank", [0, 1])
def test_a_part_that_is_missing_is_an_error_that_names_its_process(rank: int, copy: Path) -> None:
    (copy / f"stages/one/snapshots/end.rank-000{rank}.safetensors").unlink()
    with pytest.raises(LedgerNotFoundError, match=f"what rank {rank} held"):
        stage_of(copy).snapshot("end")
    with pytest.raises(LedgerNotFoundError, match=f"what rank {rank} held"):
        stage_of(copy, "two").snapshot("start")
    assert stage_of(copy).snapshot("start")
    assert stage_of(copy).problems() == [f"one: snapshots/end.rank-000{rank}.safetensors is missing"]
    assert stage_of(copy, "two").problems() == [f"two: snapshot start, rank {rank} is missing"]


def test_a_part_that_is_cut_or_changed_is_found(copy: Path) -> None:
    path = copy / "stages/one/snapshots/end.moments.rank-0001.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert stage_of(copy).problems() == [f"one: snapshots/{path.name} has another checksum than when it was sealed"]
    path.write_bytes(whole[:-4])
    with pytest.raises(CorruptPartError, match=r"the part of rank 1.*bytes"):
        stage_of(copy).moments("end")


@pytest.mark.parametrize(
    "change",
    [*({"start": start} for start in (7, 5, -1)), *({"shape": [n, 7]} for n in (12, 6, 10**15, -1)), {"shape": [11]}],
    ids=str,
)
def test_parts_that_do_not_fit_never_become_weights(change: dict[str, Any], copy: Path) -> None:
    """Files of which the length is right, but which say that they hold other rows than the rest needs."""
    found = stage_of(copy)
    for rank in ("0000", "0001") if "shape" in change else ("0001",):
        path = copy / f"stages/one/snapshots/end.rank-{rank}.safetensors"
        with safe_open(path, framework="pt") as file:
            places = json.loads(file.metadata()["shards"])
        places["embedding.weight"] |= change
        save_file(load_file(path), path, {"shards": json.dumps(places)})
        found.snapshot_entry("end")["shards"][rank]["bytes"] = path.stat().st_size
    with pytest.raises(CorruptPartError, match=r"the parts of 'embedding\.weight' do not make a whole"):
        found.snapshot("end")


def test_what_somebody_made_up_is_an_error_of_this_library(copy: Path) -> None:
    found, path = stage_of(copy), copy / "stages/one/snapshots/end.rank-0001.safetensors"
    for metadata in (None, {"shards": "{"}, {"shards": "[1]"}, {"shards": '{"no.weight": {"start": 0, "shape": [1]}}'}):
        save_file(load_file(path), path, metadata)
        found.snapshot_entry("end")["shards"]["0001"]["bytes"] = path.stat().st_size
        with pytest.raises(CorruptPartError, match=r"end\.rank-0001\.safetensors is corrupt"):
            found.snapshot("end")
    meta = json.loads((copy / "stages/one/stage.json").read_text())
    for shards in ({"../../x": {"bytes": 1, "blake2b": ""}}, {"0000": {"bytes": -1, "blake2b": ""}}, [1]):
        meta["snapshots"][-1]["shards"] = shards
        (copy / "stages/one/stage.json").write_text(json.dumps(meta))
        with pytest.raises(LedgerFormatError):
            stage_of(copy).snapshot("end")


def test_a_ledger_elsewhere(copy: Path, recorded: Path) -> None:
    memory = fsspec.filesystem("memory")
    memory.put(str(copy), "/sharded", recursive=True)
    try:
        assert_equal(
            Ledger("memory://sharded").stage("one").snapshot("end"), load_file(recorded / "one-end.safetensors")
        )
    finally:
        memory.rm("/sharded", recursive=True)
