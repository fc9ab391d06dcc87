"""What snapshots hold beside the weights: second moments, buffers, and the optimizer state that a stage begins with."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from trainer_attrib.capture.moment_readers import second_moment
from trainer_attrib.capture.recorder import Recorder
from trainer_attrib.errors import StageNotFoundError
from trainer_attrib.ledger.reader import Ledger, StageReader
from trainer_attrib.ledger.storage import Storage
from trainer_attrib.testing.zoo import LinearOnThreeAxes

MAKERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "AdamW": torch.optim.AdamW,
    "amsgrad": lambda parameters, lr: torch.optim.Adam(parameters, lr=lr, amsgrad=True),
    "RMSprop": torch.optim.RMSprop,
}


def batch_normed() -> nn.Sequential:
    """Two layers with a BatchNorm between them."""
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 1))


def fit(
    model: nn.Module, optimizer: torch.optim.Optimizer, ledger: Path | None, stage: str = "one", *, steps: int = 4,
    seed: int = 0, begin: int = 1, watch: Callable[[int], None] = lambda step: None, **options: Any,
) -> list[Tensor]:  # fmt: skip
    """Train on squares; steps before ``begin`` are those of a checkpoint, whose data are passed over."""
    generator, losses = torch.Generator().manual_seed(seed), []
    recorder = ledger and Recorder(ledger, stage=stage, model=model, optimizer=optimizer, strict=True, **options)
    if recorder and begin > 1:
        recorder.start(after_step=begin - 1)
    with recorder if recorder and begin == 1 else nullcontext():
        for step in range(1, steps + 1):
            inputs = torch.randn(6, 3, generator=generator).to(next(model.parameters()).dtype)
            if step < begin:
                continue
            loss = (model(inputs).squeeze(-1) - inputs.sum(-1)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
            watch(step)
    if recorder and begin > 1:
        recorder.finish()
    return losses


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    assert expected, "comparing nothing proves nothing"
    return found.keys() == expected.keys() and all(torch.equal(found[k], v) for k, v in expected.items())


def stage_of(ledger: Path, name: str = "one") -> StageReader:
    return Ledger(ledger).stage(name)


# ---- second moments -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MAKERS)
def test_moments_are_what_the_step_divided_by_the_root_of(kind: str, tmp_path: Path, dtype: torch.dtype) -> None:
    model: Any = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1))
    optimizer = MAKERS[kind](model.parameters(), lr=1e-2)
    seen: list[dict[str, Tensor]] = []

    def watch(step: int) -> None:
        named = model.named_parameters()
        seen.append({name: cast(Tensor, second_moment(optimizer, p)).clone() for name, p in named})

    fit(model, optimizer, tmp_path, watch=watch, snapshots=1, total_steps=4)
    stage = stage_of(tmp_path)
    assert stage.moments("start") == {}
    for name, step in (("mid-1", 2), ("end", 4)):
        assert same(stage.moments(name), seen[step - 1])
        assert all(moment.dtype is dtype for moment in stage.moments(name).values())
    assert stage.problems() == []


def test_factored_moments_are_multiplied_out(tmp_path: Path, float64: None) -> None:
    """Shazeer & Stern 2018, algorithm 4: rows columns^T over the mean of the rows."""
    model: Any = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1))
    optimizer = torch.optim.Adafactor(model.parameters(), lr=1e-2)
    fit(model, optimizer, tmp_path)
    moments = stage_of(tmp_path).moments("end")
    state = optimizer.state[model[0].weight]
    expected = state["row_var"] @ state["col_var"] / state["row_var"].mean()
    assert torch.allclose(moments["0.weight"], expected, rtol=1e-12)
    assert torch.equal(moments["0.bias"], optimizer.state[model[0].bias]["variance"])


def test_half_precision_weights_have_moments_in_single_precision(tmp_path: Path) -> None:
    model: Any = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1)).bfloat16()
    fit(model, torch.optim.AdamW(model.parameters(), lr=1e-2), tmp_path)
    moments = stage_of(tmp_path).moments("end")
    assert moments.keys() == dict(model.named_parameters()).keys()
    assert {moment.dtype for moment in moments.values()} == {torch.float32}


def test_snapshots_0_keeps_the_end_alone_and_sgd_has_none(tmp_path: Path, train: Callable) -> None:
    train(LinearOnThreeAxes(), tmp_path / "a", snapshots=0, total_steps=6)
    train(LinearOnThreeAxes(), tmp_path / "b", optimizer=lambda p: torch.optim.SGD(p, lr=0.1))
    files = sorted(path.name for path in (tmp_path / "a/stages/one/snapshots").iterdir())
    assert files == ["end.moments.safetensors", "end.safetensors", "start.safetensors"]
    assert stage_of(tmp_path / "b").moments("end") == stage_of(tmp_path / "b").buffers("end") == {}
    with pytest.raises(StageNotFoundError, match="has no snapshot 'mid-1'"):
        stage_of(tmp_path / "a").moments("mid-1")


def test_frozen_weights_have_no_moments(tmp_path: Path, train: Callable) -> None:
    model = LinearOnThreeAxes()
    model.first.requires_grad_(False)
    train(model, tmp_path)
    assert stage_of(tmp_path).moments("end").keys() == {"second.weight", "second.bias"}


# ---- optimizer state ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["AdamW", "SGD"])
def test_a_state_that_is_carried_on_is_stored_at_the_start(kind: str, tmp_path: Path) -> None:
    model: Any = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1))
    settings = {"momentum": 0.9} if kind == "SGD" else {}
    optimizer = getattr(torch.optim, kind)(model.parameters(), lr=1e-2, **settings)
    fit(model, optimizer, tmp_path)
    carried = copy.deepcopy({name: optimizer.state[p] for name, p in model.named_parameters()})
    fit(model, optimizer, tmp_path, "two")
    assert stage_of(tmp_path).optimizer_state() == {}
    found = stage_of(tmp_path, "two").optimizer_state()
    assert found.keys() == {0}
    assert found[0].keys() == carried.keys()
    for name, state in carried.items():
        assert same(found[0][name], {key: value for key, value in state.items() if value is not None})
    assert stage_of(tmp_path, "two").meta["optimizer_state_left_out"] == []
    assert stage_of(tmp_path, "two").problems() == []


def test_numbers_are_stored_and_other_entries_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model: Any = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    optimizer.state[model[0].weight] = {"step": 7, "history": [torch.zeros(1)], "nothing": None}
    optimizer.state[nn.Parameter(torch.zeros(2))] = {"stray": torch.zeros(2)}
    with caplog.at_level(logging.INFO):
        fit(model, optimizer, tmp_path)
    found = stage_of(tmp_path).optimizer_state()
    assert found == {0: {"0.weight": {"step": torch.tensor(7.0, dtype=torch.float64)}}}
    assert found[0]["0.weight"]["step"].dtype is torch.float64
    assert stage_of(tmp_path).meta["optimizer_state_left_out"] == ["0/0.weight/history", "0/?/stray"]
    assert "2 entries cannot be stored (0/0.weight/history, ...)" in caplog.text


def test_several_optimizers_are_told_apart(tmp_path: Path) -> None:
    model: Any = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1))
    halves = [torch.optim.SGD(layer.parameters(), lr=1e-2, momentum=0.5) for layer in (model[0], model[2])]
    fit(model, halves[1], None)
    with Recorder(tmp_path, stage="one", model=model, optimizer=halves):
        pass
    found = stage_of(tmp_path).optimizer_state()
    assert {number: set(states) for number, states in found.items()} == {1: {"2.weight", "2.bias"}}


# ---- buffers --------------------------------------------------------------------------------------------------------


def test_buffers_are_stored_with_each_snapshot_and_shared_with_the_parent(tmp_path: Path) -> None:
    model = batch_normed()
    model.register_buffer("passing", torch.ones(1), persistent=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    seen = [dict(copy.deepcopy(model).named_buffers())]
    fit(model, optimizer, tmp_path, snapshots=1, total_steps=4,
        watch=lambda step: seen.append(dict(copy.deepcopy(model).named_buffers())))  # fmt: skip
    fit(model, optimizer, tmp_path, "two")
    one, two = (stage_of(tmp_path, name) for name in ("one", "two"))
    for name, step in (("start", 0), ("mid-1", 2), ("end", 4)):
        del seen[step]["passing"]
        assert same(one.buffers(name), seen[step])
    assert same(two.buffers("start"), one.buffers("end"))
    assert two.meta["snapshots"][0]["buffers"]["stored_in"] == ["one", "end"]
    assert not (tmp_path / "stages/two/snapshots/start.buffers.safetensors").exists()
    assert not same(two.buffers("end"), one.buffers("end"))
    assert one.problems() == two.problems() == []


def test_buffers_changed_between_stages_are_stored_anew_and_unchanged_ones_once(tmp_path: Path) -> None:
    model: Any = batch_normed()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    fit(model, optimizer, tmp_path)
    model[1].running_mean += 1
    model[1].eval()
    for name in ("two", "three"):
        fit(model, optimizer, tmp_path, name)
    two, three = (stage_of(tmp_path, name) for name in ("two", "three"))
    assert two.parent == "one"
    assert same(two.buffers("start"), dict(model.named_buffers()))
    assert same(three.buffers("end"), two.buffers("start"))
    assert three.meta["snapshots"][-1]["buffers"]["stored_in"] == ["two", "start"]


def test_averages_inside_the_model_are_kept(tmp_path: Path) -> None:
    class Teaching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.student = nn.Linear(3, 1)
            self.teacher = AveragedModel(self.student).requires_grad_(False)

        def forward(self, inputs: Tensor) -> Tensor:
            return self.student(inputs)

    model: Any = Teaching()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    fit(model, optimizer, tmp_path, watch=lambda step: model.teacher.update_parameters(model.student))
    found = stage_of(tmp_path).buffers("end")
    assert found.keys() == {"teacher.n_averaged", "teacher.weight", "teacher.bias"}
    assert torch.equal(found["teacher.weight"], model.teacher.module.weight)
    assert int(found["teacher.n_averaged"]) == 4


# ---- nothing changes, nothing is lost -------------------------------------------------------------------------------


def test_training_is_bit_identical(tmp_path: Path) -> None:
    outcomes = []
    for ledger in (None, tmp_path):
        model = batch_normed()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        torch.manual_seed(0)
        losses = [*fit(model, optimizer, None), *fit(model, optimizer, ledger, snapshots=3, total_steps=4)]
        state = {f"{i}.{k}": v for i, s in enumerate(optimizer.state.values()) for k, v in s.items()}
        outcomes.append(dict(enumerate(losses)) | model.state_dict() | state | {"random": torch.get_rng_state()})
    assert same(outcomes[0], outcomes[1])


def test_a_resumed_stage_keeps_its_start_and_forgets_what_was_superseded(tmp_path: Path) -> None:
    model = batch_normed()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    fit(model, optimizer, None)
    whole_model, whole_optimizer = copy.deepcopy((model, optimizer))
    fit(whole_model, whole_optimizer, tmp_path / "whole", steps=6, snapshots=2, total_steps=6)
    kept: list[Any] = []

    def watch(step: int) -> None:
        if step == 2:
            kept.append(copy.deepcopy((model, optimizer)))
        if step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(model, optimizer, tmp_path / "broken", steps=6, watch=watch, snapshots=2, total_steps=6)
    model, optimizer = kept[0]
    fit(model, optimizer, tmp_path / "broken", steps=6, begin=3, snapshots=2, total_steps=6)
    whole, broken = stage_of(tmp_path / "whole"), stage_of(tmp_path / "broken")
    assert [s["name"] for s in broken.meta["snapshots"]] == ["start", "mid-1", "mid-2", "end"]
    for name in ("mid-1", "mid-2", "end"):
        assert same(broken.moments(name), whole.moments(name))
        assert same(broken.buffers(name), whole.buffers(name))
    states = [stage.optimizer_state()[0]["0.weight"] for stage in (whole, broken)]
    assert same(states[0], states[1])
    assert broken.problems() == []


@pytest.mark.parametrize("name", ["end.moments", "end.buffers", "start.optimizer", "start.buffers"])
@pytest.mark.parametrize("damage", ["gone", "flipped"])
def test_damage_is_found(name: str, damage: str, tmp_path: Path) -> None:
    model = batch_normed()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    fit(model, optimizer, None)
    fit(model, optimizer, tmp_path)
    path = tmp_path / f"stages/one/snapshots/{name}.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.unlink() if damage == "gone" else path.write_bytes(bytes(data))
    (problem,) = stage_of(tmp_path).problems()
    assert f"snapshots/{name}.safetensors" in problem
    assert ("is missing" if damage == "gone" else "checksum") in problem


def test_a_missing_file_that_a_child_shares_is_found_in_the_child(tmp_path: Path) -> None:
    model = batch_normed()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    for name in ("one", "two"):
        fit(model, optimizer, tmp_path, name)
    (tmp_path / "stages/one/snapshots/end.buffers.safetensors").unlink()
    assert stage_of(tmp_path, "two").problems() == ["two: buffers of snapshot start is missing"]


def test_ledgers_without_them_are_read(tmp_path: Path) -> None:
    model = batch_normed()
    fit(model, torch.optim.AdamW(model.parameters(), lr=1e-2), tmp_path)
    path = tmp_path / "stages/one/stage.json"
    meta = json.loads(path.read_text())
    for snapshot in meta["snapshots"]:
        for kind in ("moments", "buffers"):
            snapshot.pop(kind, None)
    del meta["optimizer_state_left_out"]
    path.write_text(json.dumps(meta))
    stage = stage_of(tmp_path)
    assert stage.moments("end") == stage.buffers("end") == stage.optimizer_state() == {}
    assert Storage(tmp_path).exists("stages/one/snapshots/end.moments.safetensors")
    fit(model, torch.optim.AdamW(model.parameters(), lr=1e-2), tmp_path, "two")
    assert stage_of(tmp_path, "two").buffers("start").keys() == dict(model.named_buffers()).keys()
