"""Rows keep their scale from step to step, and stay finite whatever the optimizer does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from trainer_attrib.ledger.reader import Ledger, StageReader
from trainer_attrib.testing.zoo import LinearOnThreeAxes, Member
from trainer_attrib.types import SketchConfig

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2),
    "radam": lambda p: torch.optim.RAdam(p, lr=1e-2),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2),
    "rmsprop-centered": lambda p: torch.optim.RMSprop(p, lr=1e-2, centered=True),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2),
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-2),
}


def _norms(stage: StageReader) -> dict[int, dict[int, float]]:
    """Version -> step -> median norm of the step's rows."""
    found: dict[int, dict[int, float]] = {}
    for block in stage.rows():
        assert np.isfinite(block.sketches).all()
        versions, steps, norms = (block.table[name].to_numpy() for name in ("version", "step", "norm"))
        for version, step in sorted(set(zip(versions.tolist(), steps.tolist(), strict=True))):
            found.setdefault(version, {})[step] = float(np.median(norms[(versions == version) & (steps == step)]))
    return found


def _spread(norms: Any) -> float:
    return max(norms) / min(norms)


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.9, 0.95)], ids=str)
def test_row_norms_are_steady_from_the_first_steps_on(
    betas: tuple[float, float], tmp_path: Path, train: Callable
) -> None:
    """Without the bias correction they would fall 3-fold from version 1 to version 3 for beta2 = 0.999.

    Raw rows (version 0) have the same units: what is left of the step to them is that an example's gradient is
    not small where the batch's is. The rate is small: training itself changes norms too, 2.4-fold over these steps at
    1e-3, as the batch's gradient falls faster than its examples' do.
    """
    for name, correction in (("raw", "none"), ("corrected", "factored")):
        torch.manual_seed(0)
        train(LinearOnThreeAxes(), tmp_path / name, steps=40, batch=16, sketch=SketchConfig(correction=correction),
              optimizer=lambda p: torch.optim.AdamW(p, lr=1e-5, betas=betas))  # fmt: skip
    raw = _norms(Ledger(tmp_path / "raw").stage("one"))[0]
    by_version = _norms(Ledger(tmp_path / "corrected").stage("one"))
    assert _spread(raw.values()) < 2, "the raw gradients themselves vary"
    assert {v: (min(steps), max(steps)) for v, steps in by_version.items()} == {
        0: (1, 4), 1: (5, 12), 2: (13, 36), 3: (37, 40),
    }  # fmt: skip
    assert all(by_version[0][step] == pytest.approx(raw[step]) for step in range(1, 5))
    assert _spread([norm for version in (1, 2, 3) for norm in by_version[version].values()]) < 2
    assert _spread([norm for steps in by_version.values() for norm in steps.values()]) < 3, "raw rows too"


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_learning_rate_that_falls_to_zero_leaves_the_sketches_finite(
    name: str, tmp_path: Path, train: Callable
) -> None:
    def fall(step: int, model: Member, optimizer: torch.optim.Optimizer) -> None:
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * (1 - step / 12)

    train(LinearOnThreeAxes(), tmp_path, steps=14, optimizer=OPTIMIZERS[name], strict=True, watch=fall)
    stage = Ledger(tmp_path).stage("one")
    norms = [norm for steps in _norms(stage).values() for norm in steps.values()]
    assert len(norms) == 14
    assert all(np.isfinite(norms))
    assert min(norms) > 0
