"""Damage is found and named; bad input gets its own error and changes nothing on disk."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from trainer_attrib.errors import (
    CorruptPartError,
    LedgerFormatError,
    LedgerNotWritableError,
    ModelMismatchError,
    StageExistsError,
    UnsupportedLayerError,
)
from trainer_attrib.ledger.reader import Ledger
from trainer_attrib.ledger.storage import Storage
from trainer_attrib.testing.zoo import LinearOnThreeAxes, PlainLinear, TiedEmbedding


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recorded ledger, made once; tests damage copies of it."""
    from trainer_attrib.capture.recorder import Recorder

    root = tmp_path_factory.mktemp("recorded")
    model = LinearOnThreeAxes()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(0)
    with Recorder(root, stage="one", model=model, optimizer=optimizer, total_steps=6, snapshots=1):
        for _ in range(6):
            inputs = model.inputs(generator, 4)
            model.losses([model(**inputs[0])], inputs).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    return root


@pytest.fixture
def ledger(recorded: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(recorded, tmp_path / "copy"))


PARTS = ["rows/part-0000-000000.f16", "rows/part-0000-000000.parquet", "steps/part-0000-000000.parquet"]


def _edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_an_undamaged_ledger_has_no_problems(ledger: Path) -> None:
    assert Ledger(ledger).stage("one").problems() == []


@pytest.mark.parametrize("name", PARTS)
def test_a_flipped_bit_is_found(name: str, ledger: Path) -> None:
    path = ledger / "stages/one" / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))
    (problem,) = Ledger(ledger).stage("one").problems()
    assert name in problem
    assert "checksum" in problem


@pytest.mark.parametrize("name", PARTS)
def test_a_truncated_part_is_found_and_refused(name: str, ledger: Path) -> None:
    path = ledger / "stages/one" / name
    path.write_bytes(path.read_bytes()[:-4])
    stage = Ledger(ledger).stage("one")
    (problem,) = stage.problems()
    assert name in problem
    with pytest.raises(CorruptPartError, match="were sealed"):
        stage.steps() if name.startswith("steps") else list(stage.rows())


def test_an_unreadable_part_of_the_right_length_is_refused(ledger: Path) -> None:
    path = ledger / "stages/one" / PARTS[2]
    path.write_bytes(bytes(path.stat().st_size))
    with pytest.raises(CorruptPartError, match="another checksum than when it was sealed"):
        Ledger(ledger).stage("one").steps()


def test_a_part_that_does_not_fit_its_row_count_is_refused(ledger: Path) -> None:
    """The manifest itself is data from elsewhere."""
    manifest = ledger / "stages/one/manifest-0000.json"
    parts = json.loads(manifest.read_text())["parts"]
    parts[0]["rows"] += 1
    _edit(manifest, parts=parts)
    with pytest.raises(CorruptPartError, match="does not fit"):
        list(Ledger(ledger).stage("one").rows())


@pytest.mark.parametrize("name", [*PARTS, "snapshots/end.safetensors", "snapshots/start.safetensors"])
def test_a_missing_file_is_found(name: str, ledger: Path) -> None:
    (ledger / "stages/one" / name).unlink()
    (problem,) = Ledger(ledger).stage("one").problems()
    assert "is missing" in problem
    assert Path(name).stem.split(".")[0] in problem


@pytest.mark.parametrize("name", ["ledger.json", "stages/one/stage.json", "stages/one/manifest-0000.json"])
def test_a_newer_format_is_refused(name: str, ledger: Path) -> None:
    _edit(ledger / name, format=99)
    with pytest.raises(LedgerFormatError, match="has format 99") as caught:
        Ledger(ledger).stage("one").parts()
    assert "upgrade" in caught.value.fix


@pytest.mark.parametrize("content", ["{", "[]", '"text"'])
def test_json_that_is_no_object_is_refused(content: str, ledger: Path) -> None:
    (ledger / "ledger.json").write_text(content)
    with pytest.raises(LedgerFormatError, match=r"ledger\.json"):
        Ledger(ledger)


def test_a_newer_ledger_is_not_written_to(ledger: Path, train: Callable, files_of: Callable) -> None:
    _edit(ledger / "ledger.json", format=99)
    before = files_of(ledger)
    with pytest.raises(LedgerFormatError, match="newer"):
        train(LinearOnThreeAxes(), ledger, "two")
    assert files_of(ledger) == before


def test_a_taken_stage_name_is_refused_before_training(ledger: Path, train: Callable, files_of: Callable) -> None:
    model, before = LinearOnThreeAxes(), files_of(ledger)
    weights = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(StageExistsError, match="'one' is already recorded"):
        train(model, ledger, "one")
    assert files_of(ledger) == before
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("kind", [PlainLinear, TiedEmbedding], ids=lambda kind: kind.__name__)
def test_another_model_is_refused(kind: type, ledger: Path, train: Callable, files_of: Callable) -> None:
    """One has a weight of another shape under the same name, the other no name in common."""
    model, before = kind(), files_of(ledger)
    with pytest.raises(ModelMismatchError, match="was recorded from another model"):
        train(model, ledger, "two")
    assert files_of(ledger) == before
    assert sorted(path.name for path in (ledger / "stages").iterdir() if path.is_dir()) == ["one"]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_file_standing_in_the_ledgers_place_is_refused(tmp_path: Path, train: Callable, files_of: Callable) -> None:
    place = tmp_path / "place"
    place.write_text("precious")
    with pytest.raises(LedgerNotWritableError, match="Cannot write"):
        train(LinearOnThreeAxes(), place)
    with pytest.raises(LedgerNotWritableError, match="Cannot write"):
        train(LinearOnThreeAxes(), place / "below")
    assert files_of(tmp_path) == {"place": b"precious"}


def test_a_model_without_known_layers_is_refused_and_leaves_no_stage(tmp_path: Path, train: Callable) -> None:
    with pytest.raises(UnsupportedLayerError, match="ConvTranspose1d"):
        train(nn.ConvTranspose1d(2, 2, 1), tmp_path)
    assert list(tmp_path.rglob("*.json")) == []


@pytest.mark.parametrize("fails", ["trainer_attrib.ledger.storage._sync", "os.replace"])
def test_a_write_that_fails_leaves_the_old_file(fails: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = Storage(tmp_path)
    storage.write("file", b"old")

    def full_disk(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(fails, full_disk)
    with pytest.raises(LedgerNotWritableError, match="No space left"):
        storage.write("file", b"new")
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("file", b"old")]


def test_a_stage_that_died_while_it_was_opened_does_not_hide_the_others(
    ledger: Path, train: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A crash while the start snapshot is written: the other stages stay readable and recording can go on."""

    def killed(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("trainer_attrib.ledger.journal.save_tensors", killed)
    with pytest.raises(KeyboardInterrupt):
        train(LinearOnThreeAxes(), ledger, "dead")
    monkeypatch.undo()
    assert "one" in [stage.name for stage in Ledger(ledger).stages()]
    train(LinearOnThreeAxes(), ledger, "two")
    assert Ledger(ledger).stage("two").meta["status"] == "complete"
