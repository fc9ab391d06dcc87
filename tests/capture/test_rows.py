"""Rows of a recorded stage: each is the projected gradient of its example's own loss, whatever the loop does."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from trainer_attrib.errors import ConfigurationError
from trainer_attrib.ledger.reader import Ledger, StageReader
from trainer_attrib.tap.plan import SketchPlan
from trainer_attrib.tap.projections import Projections
from trainer_attrib.testing.oracle import exact_sketches
from trainer_attrib.testing.zoo import BroadcastPosition, LinearOnThreeAxes, Member, TiedEmbedding, WithDropout
from trainer_attrib.types import SketchConfig

SKETCH = SketchConfig(rank=4, dtype="float32")


def _sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05)


def _rows(stage: StageReader) -> tuple[list[dict[str, Any]], torch.Tensor]:
    """Rows and their sketches at full length."""
    blocks = list(stage.rows())
    table = [row for block in blocks for row in block.table.to_pylist()]
    unit = torch.from_numpy(np.concatenate([block.sketches for block in blocks]).astype(np.float64))
    return table, unit * torch.tensor([row["norm"] for row in table]).double()[:, None]


def _projections(stage: StageReader, model: Member, version: int = 0) -> Projections:
    return Projections(SketchPlan.from_dict(stage.meta["plan"]), model, stage.factors(version), version)


def _exact(stage: StageReader, models: list[Member], accumulate: int = 1, batch: int = 4) -> torch.Tensor:
    """Replays the stage's data through the weights that each step started from."""
    generator = torch.Generator().manual_seed(0)
    versions = stage.steps()["version"].to_pylist()
    rows = []
    for model, version in zip(models, versions, strict=True):
        for _ in range(accumulate):
            inputs = model.inputs(generator, batch)
            rows.append(exact_sketches(model, inputs, _projections(stage, model, version)))
    return torch.cat(rows).double()


def _remember(models: list[Member], initial: Member) -> Callable[..., None]:
    """A watcher that keeps the weights every step started from; the last entry, after the last step, is dropped."""
    models.append(copy.deepcopy(initial))
    return lambda step, model, optimizer: models.append(copy.deepcopy(model))


@pytest.mark.parametrize("kind", [LinearOnThreeAxes, TiedEmbedding], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("clip", [None, 0.1], ids=["unclipped", "clipped"])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_rows_are_the_examples_own_gradients_under_accumulation_and_clipping(
    kind: type[Member], clip: float | None, accumulate: int, tmp_path: Path, train: Callable, close: Callable
) -> None:
    model, models = kind(), []
    watch = _remember(models, model)
    train(model, tmp_path, steps=3, accumulate=accumulate, clip=clip, watch=watch, sketch=SKETCH, optimizer=_sgd)
    stage = Ledger(tmp_path).stage("one")
    table, found = _rows(stage)
    close(found, _exact(stage, models[:-1], accumulate), relative=1e-5)
    assert {(row["denominator"], row["denominator_source"]) for row in table} == {(4.0, "given")}
    assert all(row["complete"] for row in table)
    assert [row["micro_batch"] for row in table[: 4 * accumulate]] == [m for m in range(accumulate) for _ in range(4)]


def test_rows_after_a_refresh_are_scaled_by_the_version_they_name(
    tmp_path: Path, train: Callable, close: Callable
) -> None:
    """Raw to step 4, version 1 to step 12, version 2 from there; each row fits the factors stored under its number."""
    model, models = LinearOnThreeAxes(), []
    train(model, tmp_path, steps=14, watch=_remember(models, model), sketch=SKETCH)
    stage = Ledger(tmp_path).stage("one")
    table, found = _rows(stage)
    assert [row["version"] for row in table] == [v for v in [0] * 4 + [1] * 8 + [2] * 2 for _ in range(4)]
    assert [(v["version"], v["after_step"]) for v in stage.meta["versions"]] == [(1, 4), (2, 12)]
    exact = _exact(stage, models[:-1])
    for version in range(3):
        of_version = torch.tensor([row["version"] == version for row in table])
        close(found[of_version], exact[of_version], relative=1e-5)


def test_correction_none_keeps_raw_rows(tmp_path: Path, train: Callable) -> None:
    train(LinearOnThreeAxes(), tmp_path, steps=6, sketch=SketchConfig(correction="none"))
    stage = Ledger(tmp_path).stage("one")
    assert {row["version"] for row in _rows(stage)[0]} == {0}
    assert stage.meta["versions"] == []
    assert stage.meta["correction_unavailable"] == ""


@pytest.mark.parametrize("clip", [None, 0.05], ids=["unclipped", "clipped"])
def test_audit_scale_is_the_clip_coefficient(clip: float | None, tmp_path: Path, train: Callable, dtype: Any) -> None:
    norms: list[float] = []

    def before_clipping(model: Member) -> None:
        norms.append(float(torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])))

    model = LinearOnThreeAxes()
    if clip:
        original = torch.nn.utils.clip_grad_norm_
        spy = pytest.MonkeyPatch()
        spy.setattr("torch.nn.utils.clip_grad_norm_", lambda p, c: (before_clipping(model), original(list(p), c)))
    train(model, tmp_path, steps=5, accumulate=2, clip=clip, sketch=SKETCH)
    if clip:
        spy.undo()
    steps = Ledger(tmp_path).stage("one").steps().to_pylist()
    rounding = 1e-5 if dtype == torch.float32 else 1e-12
    expected = [clip / (norm + 1e-6) for norm in norms] if clip else [1.0] * 5
    assert all(row["audit_residual"] < rounding for row in steps)
    assert [row["audit_scale"] for row in steps] == pytest.approx(expected, rel=rounding)
    assert len({row["audit_weight"] for row in steps}) == 2  # the weights take turns
    if clip:
        assert [row["gradient_norm"] for row in steps] == pytest.approx([clip] * 5, rel=1e-4)


def test_a_weight_used_outside_its_layer_fails_the_audit_and_is_left_out(tmp_path: Path, train: Callable) -> None:
    class Penalised(LinearOnThreeAxes):
        def losses(self, outputs: list[Any], inputs: list[Any]) -> torch.Tensor:
            return super().losses(outputs, inputs) + 5 * self.first.weight.square().sum()

    train(Penalised(), tmp_path, sketch=SKETCH)
    stage = Ledger(tmp_path).stage("one")
    plan = SketchPlan.from_dict(stage.meta["plan"])
    assert list(stage.meta["coverage"]["partial"]) == ["first.weight"]
    assert "residual" in stage.meta["coverage"]["partial"]["first.weight"]
    _, found = _rows(stage)
    first, second = (w.span for w in plan.weights)
    assert not found[:, first].any()
    assert found[:, second].any()
    assert "first.weight" not in stage.steps()["audit_weight"].to_pylist()


def test_coverage_names_what_is_silent_and_what_share_is_covered(tmp_path: Path, train: Callable) -> None:
    model = BroadcastPosition()
    train(model, tmp_path, sketch=SKETCH)
    coverage = Ledger(tmp_path).stage("one").meta["coverage"]
    assert list(coverage["silent"]) == ["position"]
    assert list(coverage["partial"]) == ["position.weight"]
    total = sum(p.numel() for p in model.parameters())
    assert coverage["share"] == pytest.approx(1 - model.position.weight.numel() / total)


def test_every_n_steps_captures_every_nth_step_and_records_all(tmp_path: Path, train: Callable) -> None:
    train(LinearOnThreeAxes(), tmp_path, steps=5, sketch=SketchConfig(every_n_steps=2))
    stage = Ledger(tmp_path).stage("one")
    assert stage.steps()["captured"].to_pylist() == [True, False, True, False, True]
    assert stage.steps()["rows"].to_pylist() == [4, 0, 4, 0, 4]
    assert {row["step"] for row in _rows(stage)[0]} == {1, 3, 5}


def test_rows_on_disk_have_the_chosen_precision(tmp_path: Path, train: Callable) -> None:
    """float16 rows keep the direction to 1e-3, the norm to float32."""
    for kind in ("float16", "float32"):
        torch.manual_seed(1)
        train(LinearOnThreeAxes(), tmp_path / kind, sketch=SketchConfig(rank=4, dtype=kind))
    half, full = (next(Ledger(tmp_path / kind).stage("one").rows()) for kind in ("float16", "float32"))
    assert (half.sketches.dtype, full.sketches.dtype) == (np.float16, np.float32)
    assert half.table["norm"].equals(full.table["norm"])
    assert np.abs(half.sketches[:].astype(np.float32) - full.sketches[:]).max() < 1e-3


def test_evaluation_and_ungraded_passes_are_no_rows(tmp_path: Path, train: Callable) -> None:
    """Passes without gradients, and passes that nothing backpropagates, leave nothing behind."""

    def evaluate(step: int, model: Member, optimizer: Any) -> None:
        inputs = model.inputs(torch.Generator().manual_seed(9), 2)
        with torch.no_grad():
            model(**inputs[0])
        model(**inputs[0])

    train(LinearOnThreeAxes(), tmp_path, steps=3, watch=evaluate)
    table, _ = _rows(Ledger(tmp_path).stage("one"))
    assert [row["step"] for row in table] == [s for s in (1, 2, 3) for _ in range(4)]


@pytest.mark.parametrize(
    "bad",
    [
        {"rank": 0},
        {"rank": 5000},
        {"every_n_steps": 0},
        {"sample": 0.0},
        {"sample": 25},
        {"correction": "x"},
        {"dtype": "f8"},
    ],
)
def test_settings_that_cannot_work_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=next(iter(bad))):
        SketchConfig(**bad)


def test_plain_loop_is_bit_identical_with_dropout(tmp_path: Path, train: Callable) -> None:
    runs = []
    for ledger in (None, tmp_path):
        torch.manual_seed(5)
        runs.append((train(WithDropout(), ledger, steps=8, accumulate=2, clip=0.1), torch.get_rng_state()))
    (plain, plain_state), (recorded, recorded_state) = runs
    assert all(torch.equal(a, b) for a, b in zip(plain.losses, recorded.losses, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(plain.model.parameters(), recorded.model.parameters(), strict=True))
    assert torch.equal(plain_state, recorded_state)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])  # noqa: S301
def test_copies_of_the_model_made_in_mid_training_work_and_are_not_recorded(
    duplicate: Callable, tmp_path: Path, train: Callable
) -> None:
    """Averages of the weights are deep copies of the model; their passes are not training."""

    def copy_and_run(step: int, model: Member, optimizer: Any) -> None:
        duplicated, inputs = duplicate(model), model.inputs(torch.Generator().manual_seed(9), 4)
        duplicated.losses([duplicated(**inputs[0])], inputs).mean().backward()

    train(LinearOnThreeAxes(), tmp_path, steps=3, watch=copy_and_run, strict=True)
    stage = Ledger(tmp_path).stage("one")
    assert stage.meta["status"] == "complete"
    assert stage.steps()["rows"].to_pylist() == [4, 4, 4]
