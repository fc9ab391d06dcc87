"""The contract that every integration keeps: inherit the suite, implement ``train``, and pytest runs all of it.

::

    from trainer_attrib.testing.contract import IntegrationContract
    from trainer_attrib.testing.run import Run, Trained

    class TestMyTrainer(IntegrationContract):
        def train(self, run: Run) -> Trained:
            ...

docs/extending.md, "An integration of your own", has a whole one. This module needs pytest; no other one does.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.optim import SGD

from trainer_attrib.errors import StageExistsError
from trainer_attrib.ledger.reader import Ledger, StageReader
from trainer_attrib.testing.leftovers import hooks_around
from trainer_attrib.testing.reference import Expected, ReferenceStep, reference_steps
from trainer_attrib.testing.run import Run, Trained, make_examples
from trainer_attrib.types import SketchConfig

PRECISION = 1e-6
"""Largest difference from the float64 reference, relative to its size."""

NOT_SUPPORTED = "not supported by this integration"
"""How the reason of a skipped test begins."""

CASES: dict[str, dict[str, Any]] = {
    "two epochs, a smaller last batch": {},
    "accumulation": {"accumulate": 3, "epochs": 3},
    "clipping": {"accumulate": 3, "epochs": 3, "clip": 0.05},
    "max_steps in mid-epoch": {"epochs": None, "max_steps": 4},
    "a rate that falls to 0": {"schedule": lambda step: max(0.0, 1 - step / 6)},
    "SGD with momentum": {"optimizer": lambda p: SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01)},
    "two parameter groups": {
        "optimizer": lambda p: torch.optim.AdamW([{"params": p[:1], "lr": 1e-3}, {"params": p[1:]}], weight_decay=0.1)
    },
    "second moments folded in": {"epochs": 3, "sketch": SketchConfig(rank=4, dtype="float32")},
}


class IntegrationContract:
    """What recording must do, and must not do, in any framework: each test trains by ``train`` and reads the ledger.

    ``unsupported`` says which of the features ``"resume"``, ``"skipped steps"``, ``"workers"`` and ``"event order"``
    the integration does not have, with the reason; their tests are skipped with it.
    """

    unsupported: ClassVar[Mapping[str, str]] = {
        "resume": "no checkpoints",
        "skipped steps": "no gradient scaler",
        "event order": "no events are relied on",
    }
    event_order: ClassVar[Mapping[str, list[str]]] = {}
    """Framework and version, oldest first (``"transformers 5.23"``) -> the events of two steps of two micro-batches."""

    def train(self, run: Run) -> Trained:
        """Train ``run.model()`` as the run says, recorded into ``run.ledger`` unless that is None.

        Nothing is caught: what breaks the run off is raised to the caller.
        """
        raise NotImplementedError

    def events(self, run: Run) -> tuple[str, list[str]]:
        """The framework's name and version, and the order in which a run's events arrived."""
        raise NotImplementedError

    # ---- what is recorded ---------------------------------------------------------------------------------------

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
    @pytest.mark.parametrize("case", CASES)
    def test_rows_are_the_examples_own_gradients(self, case: str, dtype: torch.dtype, tmp_path: Path) -> None:
        """And steps hold what the optimizer used: all equal to the same run in float64, example by example."""
        run = Run(tmp_path, tmp_path / "ledger", dtype=dtype, **CASES[case])
        trained = _seeded(self, run)
        stage, steps = _stage(run), reference_steps(run)
        assert stage.meta["status"] == "complete"
        assert stage.problems() == []
        expected = Expected(run, stage)
        _check_rows(stage, steps, expected)
        _check_steps(run, stage, steps, expected)
        own = dict(run.made[0].named_parameters())
        for name, weight in steps[-1].weights.items():
            _assert_close(own[name].detach(), weight, PRECISION)
        assert trained.losses

    @pytest.mark.parametrize("workers", [0, 2])
    def test_shuffled_examples_keep_their_names(self, workers: int, tmp_path: Path) -> None:
        """Each once per epoch, in a new order each time, its row beside its own id."""
        if workers:
            self._needs("workers")
        run = Run(tmp_path, tmp_path / "ledger", epochs=2, shuffle=True, workers=workers, optimizer=_standing_still)
        _seeded(self, run)
        table, sketches = _rows(_stage(run))
        names = [row["example"] for row in table]
        count = len(run.examples)
        assert Counter(names[:count]) == Counter(names[count:]) == Counter(e["id"] for e in run.examples)
        assert names[:count] != names[count:]
        expected = Expected(run, _stage(run))
        (step,) = reference_steps(replace(run, shuffle=False, batch_size=count, epochs=1))
        own = dict(step.examples[0])
        for row, sketch in zip(table, sketches, strict=True):
            _assert_close(sketch * row["norm"], expected.row(own[row["example"]]), PRECISION)

    def test_a_row_does_not_depend_on_its_batch(self, tmp_path: Path) -> None:
        """The same example in batches of 5, 2 and 1, at the same weights."""
        found = []
        for size in (5, 2, 1):
            run = Run(tmp_path, tmp_path / f"ledger-{size}", epochs=1, batch_size=size, optimizer=_standing_still)
            _seeded(self, run)
            table, sketches = _rows(_stage(run))
            found.append({row["example"]: sketch * row["norm"] for row, sketch in zip(table, sketches, strict=True)})
        for example, row in found[0].items():
            _assert_close(found[1][example], row, PRECISION)
            _assert_close(found[2][example], row, PRECISION)

    # ---- what is left alone ---------------------------------------------------------------------------------------

    @pytest.mark.parametrize("case", ["two epochs, a smaller last batch", "clipping", "max_steps in mid-epoch"])
    def test_training_is_bit_identical(self, case: str, tmp_path: Path) -> None:
        """Losses, weights and random states, with dropout and shuffling; and no hook is left."""
        settings = {**CASES[case], "dropout": 0.2, "shuffle": True}
        plain, recorded = Run(tmp_path / "plain", **settings), Run(tmp_path, tmp_path / "ledger", **settings)
        _assert_same(_outcome(self, plain), _outcome(self, recorded))
        assert _stage(recorded).meta["status"] == "complete"

    @pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt], ids=lambda error: error.__name__)
    def test_a_run_that_breaks_off_is_closed(self, error: type[BaseException], tmp_path: Path) -> None:
        """In mid-epoch: the exception goes on, sealed rows stay, the stage says why it is incomplete, no hook stays."""
        settings: dict[str, Any] = {"epochs": 3, "breaks_at": 5, "error": error}
        plain, recorded = Run(tmp_path / "plain", **settings), Run(tmp_path, tmp_path / "ledger", **settings)
        raised = [self._broken_off(run) for run in (plain, recorded)]
        assert type(raised[0]) is type(raised[1])
        assert str(raised[0]) == str(raised[1])
        assert hooks_around(recorded.made[0]) == hooks_around(plain.made[0])
        stage = _stage(recorded)
        assert (stage.meta["status"], stage.meta["reason"]) == ("incomplete", f"{error.__name__}: stopped")
        assert stage.problems() == []
        steps = reference_steps(replace(recorded, epochs=None, max_steps=4))
        _check_rows(stage, steps, Expected(recorded, stage))

    def test_a_capture_fault_does_not_end_training(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Without ``strict``: the same losses, weights and random states, and a stage that says what failed."""
        plain = _outcome(self, Run(tmp_path / "plain", dropout=0.2))
        run = Run(tmp_path, tmp_path / "ledger", dropout=0.2, strict=False)

        def injected(*args: Any) -> Any:
            raise OSError("injected")

        monkeypatch.setattr("trainer_attrib.tap.record.sketch_examples", injected)
        _assert_same(plain, _outcome(self, run))
        meta = _stage(run).meta
        assert meta["status"] == "incomplete"
        assert "OSError: injected" in meta["reason"]

    def test_a_stage_that_exists_is_refused_before_the_first_step(self, tmp_path: Path) -> None:
        """Nothing is overwritten, and no weight has moved."""
        first, again = (Run(tmp_path / name, tmp_path / "ledger", epochs=1) for name in ("first", "again"))
        _seeded(self, first)
        with pytest.raises(StageExistsError):
            _seeded(self, again)
        assert all(model.passes == 0 for model in again.made)
        assert len(_rows(_stage(first))[0]) == len(first.examples)

    # ---- what not every integration has ---------------------------------------------------------------------------

    def test_a_resumed_run_has_every_row_once(self, tmp_path: Path) -> None:
        """Broken off in mid-epoch a step after a checkpoint, then resumed: the rows of a run that was not."""
        self._needs("resume")
        settings: dict[str, Any] = {"epochs": 3, "save_every": 2}
        whole = Run(tmp_path / "whole", tmp_path / "whole-ledger", **settings)
        _seeded(self, whole)
        broken = Run(tmp_path / "broken", tmp_path / "ledger", breaks_at=6, **settings)
        self._broken_off(broken)
        resumed = Run(tmp_path / "broken", tmp_path / "ledger", resume=True, **settings)
        _seeded(self, resumed)
        stage, steps = _stage(resumed), reference_steps(whole)
        assert stage.meta["status"] == "complete"
        assert stage.problems() == []
        _check_rows(stage, steps, Expected(resumed, stage))
        _check_steps(resumed, stage, steps, Expected(resumed, stage))

    @pytest.mark.parametrize(("accumulate", "overflow_at"), [(1, 3), (3, 5)], ids=["one", "in a window of three"])
    def test_steps_skipped_by_a_scaler_are_not_counted_as_executed(
        self, accumulate: int, overflow_at: int, tmp_path: Path
    ) -> None:
        """A gradient that overflows is not applied: no weight moves, and no row claims that its example trained it.
        What is applied has the rows, losses and weights of a run that left the skipped window out."""
        self._needs("skipped steps")
        run = Run(tmp_path, tmp_path / "ledger", epochs=3, accumulate=accumulate, overflow_at=overflow_at)
        _seeded(self, run)
        stage, steps = _stage(run), reference_steps(run)
        assert len(steps) == 9 // accumulate - 1
        expected = Expected(run, stage)
        _check_rows(stage, steps, expected)
        _check_steps(run, stage, steps, expected)
        (skipped,) = stage.skipped_steps().to_pylist()
        assert (skipped["step"], skipped["rows"], skipped["captured"]) == ((overflow_at - 1) // accumulate, 0, False)
        for name, weight in steps[-1].weights.items():
            _assert_close(dict(run.made[0].named_parameters())[name].detach(), weight, PRECISION)

    def test_events_come_in_the_order_relied_on(self, tmp_path: Path) -> None:
        """Pinned by version of the framework; one that is not listed must keep the newest order, and says so if not."""
        self._needs("event order")
        version, found = self.events(Run(tmp_path, examples=make_examples(8), batch_size=2, accumulate=2, epochs=1))
        newest = list(self.event_order)[-1]
        pinned = next((known for known in self.event_order if version.startswith(known)), newest)
        expected = self.event_order[pinned]
        first = next((i for i, pair in enumerate(zip(found, expected, strict=False)) if pair[0] != pair[1]), None)
        first = min(len(found), len(expected)) if first is None else first
        assert found == expected, (
            f"{version} sends its events in another order than {pinned}. Event {first} is {found[first:][:1]}, pinned "
            f"is {expected[first:][:1]}. See how the integration uses them before pinning the new order: {found}"
        )

    # ---- how --------------------------------------------------------------------------------------------------------

    def _needs(self, feature: str) -> None:
        if feature in self.unsupported:
            pytest.skip(f"{NOT_SUPPORTED}: {self.unsupported[feature]}")

    def _broken_off(self, run: Run) -> BaseException:
        with pytest.raises(BaseException) as raised:  # noqa: PT011  # the caller compares what it was
            _seeded(self, run)
        error = raised.value
        raised.value.__traceback__ = None  # frames would keep the trainer alive
        return error


def _seeded(suite: IntegrationContract, run: Run) -> Trained:
    run.folder.mkdir(parents=True, exist_ok=True)
    random.seed(run.seed)
    np.random.seed(run.seed)
    torch.manual_seed(run.seed)
    return suite.train(run)


def _outcome(suite: IntegrationContract, run: Run) -> dict[str, Any]:
    """Everything that recording must not change."""
    trained = _seeded(suite, run)
    state = {"torch": torch.get_rng_state(), "numpy": np.random.get_state(), "python": random.getstate()}
    weights = {name: p.detach().clone() for name, p in trained.model.named_parameters()}
    return {"losses": trained.losses, "weights": weights, "hooks": hooks_around(run.made[0]), **state}


def _assert_same(plain: dict[str, Any], recorded: dict[str, Any]) -> None:
    assert len(plain["losses"]) > 1
    assert plain["losses"] == recorded["losses"]
    assert plain["weights"].keys() == recorded["weights"].keys()
    assert all(torch.equal(weight, recorded["weights"][name]) for name, weight in plain["weights"].items())
    assert torch.equal(plain["torch"], recorded["torch"])
    assert str(plain["numpy"]) == str(recorded["numpy"])
    assert plain["python"] == recorded["python"]
    assert plain["hooks"] == recorded["hooks"]


def _standing_still(parameters: Any) -> SGD:
    """All examples meet the same weights."""
    return SGD(parameters, lr=0.0)


def _stage(run: Run) -> StageReader:
    assert run.ledger is not None
    return Ledger(run.ledger).stage("one")


def _rows(stage: StageReader) -> tuple[list[dict[str, Any]], Tensor]:
    """The table of all rows in the order of training, and their unit sketches [N, width]."""
    blocks = list(stage.rows())
    table = [row for block in blocks for row in block.table.to_pylist()]
    sketches = torch.from_numpy(np.concatenate([np.array(block.sketches) for block in blocks])).double()
    order = sorted(range(len(table)), key=lambda i: (table[i]["step"], table[i]["micro_batch"], table[i]["row"]))
    return [table[i] for i in order], sketches[order]


def _check_rows(stage: StageReader, steps: list[ReferenceStep], expected: Expected) -> None:
    """All rows and no others, each with its place, its denominator and its example's own gradient."""
    table, sketches = _rows(stage)
    wanted = [
        ({"step": number, "micro_batch": index, "row": row, "example": example}, step, index, gradient)
        for number, step in enumerate(steps, 1)
        for index, micro in enumerate(step.examples)
        for row, (example, gradient) in enumerate(micro)
    ]
    assert [{key: row[key] for key in ("step", "micro_batch", "row", "example")} for row in table] == [
        place for place, *_ in wanted
    ]
    for row, sketch, (_, step, index, gradient) in zip(table, sketches, wanted, strict=True):
        _assert_close(sketch * row["norm"], expected.row(gradient, row["version"]), PRECISION)
        assert row["complete"]
        assert row["denominator"] == pytest.approx(step.denominators[index], rel=PRECISION)
        assert row["epoch"] is None or int(row["epoch"] + 1e-6) == step.epoch


def _check_steps(run: Run, stage: StageReader, steps: list[ReferenceStep], expected: Expected) -> None:
    """Every step once, with the loss, the gradient and the settings that it used, and its projected weights."""
    table = stage.steps().to_pylist()
    assert [row["step"] for row in table] == list(range(1, len(steps) + 1))
    for row, step in zip(table, steps, strict=True):
        groups = step.settings
        assert row["loss"] == pytest.approx(step.loss, rel=PRECISION)
        assert row["gradient_norm"] == pytest.approx(step.gradient_norm, rel=PRECISION)
        assert row["clip_threshold"] == run.clip
        assert row["learning_rate"] == pytest.approx([group["lr"] for group in groups], rel=PRECISION)
        assert row["weight_decay"] == pytest.approx([group["weight_decay"] for group in groups])
        betas = [group.get("betas", (group.get("momentum", 0.0), 0.0)) for group in groups]
        assert [row["beta1"], row["beta2"]] == [[first for first, _ in betas], [second for _, second in betas]]
        assert row["micro_batches"] == len(step.examples)
        projected = torch.from_numpy(np.frombuffer(row["projected_weights"], np.float32).copy())
        _assert_close(projected, expected.weights(step.weights), PRECISION)


def _assert_close(found: Tensor, expected: Tensor, relative: float) -> None:
    assert float(expected.norm()) > 0, "comparing with zeros proves nothing"
    assert float((found.double() - expected.double()).norm() / expected.double().norm()) < relative
