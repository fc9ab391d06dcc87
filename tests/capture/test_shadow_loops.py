"""Shadows in plain loops: training and its rows do not notice them, checkpoints keep them, some loops are refused."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import trainer_attrib as ta
from tests.capture.test_shadow import OPTIMIZERS, WHOLE, Loop, assert_close, make, named, stage_of
from tests.support import support
from trainer_attrib.capture.processes import Processes
from trainer_attrib.capture.shadows.parts import PartLoss, Turns
from trainer_attrib.capture.shadows.replica import Replica
from trainer_attrib.capture.shadows.same_gradients import SameGradients
from trainer_attrib.errors import CaptureError, ConfigurationError, StageNotFoundError
from trainer_attrib.testing.leftovers import hooks_around

# ---- training is sacred ---------------------------------------------------------------------------------------------


@support("Shadows", "plain loop")
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_neither_training_nor_its_rows_notice(kind: str, tmp_path: Path) -> None:
    """Losses, weights, buffers, gradients, optimizer state, random states, and every number that is recorded."""
    loop, model = Loop(OPTIMIZERS[kind], clip=0.3, accumulate=2), make(normed=True, drop=0.3)
    for ledger in ("plain", "shadowed"):
        loop.run(copy.deepcopy(model), 0, tmp_path / ledger, "a")
    loop.run(model, 0)
    shadow = {"plain": (), "shadowed": [ta.Shadow("a", thin=2, every=2, replicas=2, device="cpu")]}
    outcomes = []
    for ledger in ("plain", "shadowed"):
        again, before = copy.deepcopy(model), hooks_around(model)
        loop.losses = []
        tuner = loop.run(again, 1, tmp_path / ledger, "b", shadow=shadow[ledger])
        assert hooks_around(again) == before
        rows = [
            (block.table.to_pydict(), np.array(block.sketches)) for block in stage_of(tmp_path / ledger, "b").rows()
        ]
        states = [value for state in tuner.state.values() for value in state.values()]
        outcomes.append((
            [*loop.losses, *again.state_dict().values(), *states, torch.get_rng_state()],
            (random.getstate(), np.random.get_state()[1].tolist()),  # type: ignore[index]
            [table for table, _ in rows], np.concatenate([sketches for _, sketches in rows]),
        ))  # fmt: skip
    (tensors, states, tables, sketches), expected = outcomes[1], outcomes[0]
    assert all(torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a, b in zip(tensors, expected[0], strict=True))
    assert (states, tables) == expected[1:3]
    assert sketches.size > 0
    np.testing.assert_array_equal(sketches, expected[3])


def test_replicas_see_different_examples_and_surround_the_truth(tmp_path: Path, float64: None) -> None:
    """Halves of each batch: where all its examples are the same, both are exact."""

    class Same(Loop):
        def _micro(self, model: Any, batch: Any, recorder: Any) -> None:
            super()._micro(model, {key: value[:1].repeat(8, 1) for key, value in batch.items()}, recorder)

    for kind, agree in ((Same, True), (Loop, False)):
        loop, model, ledger = (
            kind(OPTIMIZERS["SGD with momentum"], clip=0.3, accumulate=2),
            make(),
            tmp_path / kind.__name__,
        )
        other = copy.deepcopy(model)
        loop.run(model, 0, ledger, "a")
        loop.run(model, 1, ledger, "b", shadow=ta.Shadow("a", thin=1, replicas=2))
        loop.run(other, 1)
        first, second = (stage_of(ledger, "b").shadow("a", replica) for replica in range(2))
        assert all(torch.allclose(first[name], second[name], rtol=1e-10) for name in first) is agree
        if agree:
            assert_close(first, named(other))
    assert [entry["share"] for entry in stage_of(tmp_path / "Loop", "b").shadows()] == [0.5, 0.5]


@support("Shadows", "a gradient scaler, and steps that it skips")
def test_a_gradient_scaler(tmp_path: Path, float64: None) -> None:
    """Losses are scaled, one step is skipped, and the shadow skips it too."""

    def run(model: Any, seed: int, ledger: Path | None, stage: str, shadow: Any = ()) -> None:
        tuner = torch.optim.AdamW(model.parameters(), lr=1e-2)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
        recorder = None
        if ledger:
            recorder = ta.Recorder(
                ledger, stage=stage, model=model, optimizer=tuner, scaler=scaler, shadow=shadow, strict=True
            ).start()
        generator = torch.Generator().manual_seed(seed)
        for step in range(6):
            x = torch.randn(8, 4, generator=generator)

            def loss_of(x: Any) -> Any:
                return (model(x) - x[:, :2]).square().mean()

            loss = loss_of(x)
            if recorder:
                with recorder.batch(loss=loss_of, of=x):
                    scaler.scale(loss_of(x)).backward()
            else:
                scaler.scale(loss).backward()
            if step == 2:
                model[0].weight.grad.fill_(torch.inf)
            scaler.step(tuner)
            scaler.update()
            tuner.zero_grad()
        if recorder:
            recorder.finish()

    model = make()
    other = copy.deepcopy(model)
    run(model, 0, tmp_path, "a")
    run(model, 1, tmp_path, "b", [WHOLE])
    run(other, 1, None, "")
    assert stage_of(tmp_path, "b").skipped_steps().num_rows == 1
    assert_close(stage_of(tmp_path, "b").shadow("a"), named(other))


# ---- what a loop may do wrong ---------------------------------------------------------------------------------------


class Silent(Loop):
    """Clips without a word."""

    def _micro(self, model: Any, batch: Any, recorder: Any) -> None:
        super()._micro(model, batch, recorder)
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)


class Mute(Loop):
    """Does not say how its loss is computed."""

    def _micro(self, model: Any, batch: Any, recorder: Any) -> None:
        (model(batch["x"]) - batch["y"]).square().mean().backward()


class Ragged(Loop):
    """Hands over something that cannot be cut."""

    def _micro(self, model: Any, batch: Any, recorder: Any) -> None:
        with recorder.batch(loss=lambda part: model(part["x"]).sum(), of={**batch, "edges": torch.zeros(3, 2)}):
            model(batch["x"]).sum().backward()


@pytest.mark.parametrize(
    ("kind", "says"),
    [(Silent, "gradients of norm 0.1"), (Mute, "No loss was computed again"), (Ragged, "'edges' is a tensor of shape")],
)
def test_a_shadow_that_would_be_wrong_is_given_up(kind: type[Loop], says: str, tmp_path: Path) -> None:
    model = make()
    Loop().run(model, 0, tmp_path, "a")
    other = copy.deepcopy(model)
    kind().run(model, 1, tmp_path, "b", shadow=[ta.Shadow("a")], strict=False)
    stage = stage_of(tmp_path, "b")
    (entry,) = stage.shadows()
    assert (stage.meta["status"], entry["status"], stage.count("steps")) == ("complete", "incomplete", 5)
    assert says in entry["reason"]
    with pytest.raises(StageNotFoundError, match="no complete shadow of 'a'"):
        stage.shadow("a")
    with pytest.raises(Exception, match=says):
        kind().run(other, 1, tmp_path, "strictly", shadow=[ta.Shadow("a")])


def test_a_fault_of_one_and_then_of_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the same micro-batch: each says what came first, and training goes on."""
    model = make()
    Loop().run(model, 0, tmp_path, "a")
    other = copy.deepcopy(model)

    def breaks(self: Any, *args: Any) -> None:
        if getattr(self, "number", 0) == 0:
            raise RuntimeError(type(self).__name__)

    monkeypatch.setattr(Replica, "compare", breaks)
    monkeypatch.setattr(SameGradients, "backpropagated", breaks)
    Loop().run(model, 1, tmp_path, "b", shadow=ta.Shadow("a", replicas=2), strict=False)
    Loop().run(other, 1)
    entries = [(e["status"], e["reason"]) for e in stage_of(tmp_path, "b").shadows()]
    assert entries == [("incomplete", f"step 1: RuntimeError: {kind}") for kind in ("Replica", "SameGradients")]
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))


def test_a_faulty_recording_ends_its_shadows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is kept of them says why."""
    model = make()
    Loop().run(model, 0, tmp_path, "a")
    loop = Loop(on_step=lambda step, model, recorder: step == 2 and recorder.attempt(lambda: 1 / 0))
    loop.run(model, 1, tmp_path, "b", shadow=[ta.Shadow("a")], strict=False)
    (entry,) = stage_of(tmp_path, "b").shadows()
    assert (entry["status"], entry["steps"]) == ("incomplete", 2)
    assert "ZeroDivisionError" in entry["reason"]


# ---- resuming -------------------------------------------------------------------------------------------------------


@support("Shadows", "plain loop, checkpoint and resume")
def test_a_loop_goes_on_with_its_shadows(tmp_path: Path, float64: None) -> None:
    shadow = [ta.Shadow("a", thin=2, every=2, replicas=2, device="cpu")]
    loop, model = Loop(clip=0.3), make(normed=True)
    loop.run(model, 0, tmp_path, "a")
    broken, saved = copy.deepcopy(model), {}
    loop.run(model, 1, tmp_path, "whole", shadow=shadow)

    def save(step: int, model: Any, recorder: Any) -> None:
        if step == 3:
            recorder.checkpoint()
            saved.update(model=copy.deepcopy(model), tuner=recorder._watch.optimizers[0].state_dict())
            saved["tuner"] = copy.deepcopy(saved["tuner"])
        if step == 4:
            raise KeyboardInterrupt

    loop.on_step = save
    with pytest.raises(KeyboardInterrupt):
        loop.run(broken, 1, tmp_path, "b", shadow=shadow)
    loop.on_step = lambda step, model, recorder: None
    tuner = loop.optimizer(saved["model"].parameters())
    tuner.load_state_dict(saved["tuner"])
    loop.run(saved["model"], 1, tmp_path, "b", shadow=shadow, tuner=tuner, begin=4)
    for replica in range(2):
        found, expected = stage_of(tmp_path, "b"), stage_of(tmp_path, "whole")
        assert_close(found.shadow("a", replica), expected.shadow("a", replica))
        assert_close(found.shadow_buffers("a", replica), expected.shadow_buffers("a", replica))
    assert [e["steps"] for e in found.shadows()] == [5, 5]


def test_a_resumed_stage_whose_shadows_were_not_stored_goes_on_without(tmp_path: Path) -> None:
    model = make()
    Loop().run(model, 0, tmp_path, "a")
    start = copy.deepcopy(model)

    def die(step: int, model: Any, recorder: Any) -> None:
        if step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Loop(on_step=die).run(model, 1, tmp_path, "b", shadow=[WHOLE])
    Loop().run(start, 1, tmp_path, "b", shadow=[WHOLE], begin=3, strict=False)
    (entry,) = stage_of(tmp_path, "b").shadows()
    assert entry["status"] == "incomplete"
    assert "resumed after step 2, for which the shadow was not stored" in entry["reason"]


# ---- refusals -------------------------------------------------------------------------------------------------------


def _with_a_stranger(model: Any) -> Any:
    return torch.optim.SGD([*model.parameters(), nn.Parameter(torch.ones(2))])


def _stepping_early(model: Any) -> Any:
    model[0].weight.register_post_accumulate_grad_hook(lambda parameter: None)
    return torch.optim.SGD(model.parameters())


REFUSED: dict[str, Callable[[Any], Any]] = {
    "there are 2 optimizers": lambda m: [torch.optim.SGD(m[0].parameters()), torch.optim.SGD(m[-1].parameters())],
    "LBFGS": lambda m: torch.optim.LBFGS(m.parameters()),
    "during the backward pass": _stepping_early,
    "updates 1 weights that the model does not hold": lambda m: torch.optim.SGD(
        [*m.parameters(), nn.Parameter(torch.ones(2))]
    ),
    "compiled": lambda m: m[0].compile() or torch.optim.SGD(m.parameters()),
}


@support(
    "Shadows", "several optimizers, LBFGS, compiled models, optimizers that step inside the backward pass", refused=True
)
@pytest.mark.parametrize("says", REFUSED)
def test_training_that_cannot_be_followed_is_refused(says: str, tmp_path: Path) -> None:
    model = make()
    Loop().run(model, 0, tmp_path, "a")
    with pytest.raises(ConfigurationError, match=says):
        ta.Recorder(tmp_path, stage="b", model=model, optimizer=REFUSED[says](model), shadow="a")


@support("Shadows", "several processes (DDP, FSDP)", refused=True)
def test_several_processes_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make()
    monkeypatch.setattr(Processes, "current", staticmethod(lambda: Processes(1, 2)))
    with pytest.raises(ConfigurationError, match=r"several processes \(DDP or FSDP\)"):
        ta.Recorder(tmp_path, stage="b", model=model, optimizer=torch.optim.SGD(model.parameters()), shadow="a")


def test_weights_that_continue_nothing_have_no_shadow(tmp_path: Path) -> None:
    recorder = ta.Recorder(
        tmp_path, stage="b", model=(m := make()), optimizer=torch.optim.SGD(m.parameters()), shadow="a"
    )
    with pytest.raises(ConfigurationError, match="this stage continues no recorded stage"):
        recorder.start()
    assert not (tmp_path / "stages" / "b").exists()


# ---- parts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("share", "replicas", "sizes"), [(4, 1, [8]), (4, 2, [8, 8]), (8, 2, [3, 3, 3]), (4, 1, [1] * 8)]
)
def test_replicas_take_disjoint_examples_and_each_gets_its_turn(share: int, replicas: int, sizes: list[int]) -> None:
    turns, taken = Turns(share, replicas), [set[tuple[int, int]]() for _ in range(replicas)]
    for step in range(8):
        turns.begin(step)
        counts = [0] * replicas
        for micro, size in enumerate(sizes):
            parts = turns.of(size)
            assert len(set().union(*parts)) == sum(map(len, parts)), "an example is in two parts"
            for replica, part in enumerate(parts):
                counts[replica] += len(part)
                taken[replica] |= {(micro, position) for position in part}
        assert counts == [-(-sum(sizes) // share)] * replicas
    assert all(len({position for _, position in each}) == max(sizes) for each in taken)


def test_a_batch_is_cut_in_any_nesting() -> None:
    pairs = PartLoss(
        {"x": torch.arange(8).reshape(8, 1), "meta": {"ids": ["a", "b", "c", "d"], "weight": torch.arange(4.0)},
         "scale": torch.tensor(2.0), "both": (torch.arange(8), None)},
        loss_of=lambda part: part, sides=2,
    )  # fmt: skip
    part = pairs.of([1, 3])
    assert part["x"].flatten().tolist() == [1, 3, 5, 7]
    assert (part["meta"]["ids"], part["meta"]["weight"].tolist()) == (["b", "d"], [1.0, 3.0])
    assert (part["scale"].item(), part["both"][0].tolist(), part["both"][1]) == (2.0, [1, 3, 5, 7], None)
    assert pairs.of(range(4))["x"] is pairs.batch["x"]
    with pytest.raises(CaptureError, match="it holds no tensor"):
        PartLoss({"text": "a"}, loss_of=lambda part: part).examples  # noqa: B018
