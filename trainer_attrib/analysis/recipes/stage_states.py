"""Recorded states of a stage at which examples can be scored, and how far a gradient moved each weight there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trainer_attrib.analysis.displacement import Displacement
from trainer_attrib.analysis.effects.lineage import Lineage
from trainer_attrib.analysis.training_state import TrainingState
from trainer_attrib.errors import NotComparableError
from trainer_attrib.ledger.reader import StageReader
from trainer_attrib.tap.names import parameters_by_name


@dataclass(frozen=True)
class StageState:
    """The model as it was at a snapshot of a stage.

    Args:
        training: weights and buffers.
        reach: how far an optimizer step moved each weight per unit of gradient, times the share of the stage's steps
            for which this state stands; by weight name, 0-dim or in the weight's shape.
    """

    training: TrainingState
    reach: dict[str, Tensor]

    def direction(self, gradient: Displacement) -> Displacement:
        """Reach times gradient, of the weights that the stage trained."""
        return {name: self.reach[name] * part for name, part in gradient.items() if name in self.reach}


def stage_states(lineage: Lineage, stage: StageReader, snapshots: Sequence[str]) -> list[StageState]:
    """States of a stage, each of which stands for the optimizer steps that are nearest to it.

    Reach is the learning rate that a step used over the root of the second moment (plus epsilon) for optimizers that
    divide by it, and lr / (1 - momentum) for SGD. Where no gradient was seen yet, a weight does not move. Second
    moments are those of the nearest snapshot that has them: a fresh optimizer has none.

    Args:
        lineage: of the model.
        stage: to be scored.
        snapshots: names; none stands for all that are recorded.

    Raises:
        StageNotFoundError: no such snapshot.
        NotComparableError: the model has none of the weights that the stage trained.
    """
    recorded = {entry["name"]: entry["step"] for entry in stage.meta["snapshots"]}
    for name in {*snapshots} - recorded.keys():
        stage.snapshot(name)
    chosen = sorted({*(snapshots or recorded)}, key=recorded.__getitem__)
    gone = missing_trained(lineage, stage)
    trained = [name for name in _trained(stage) if name not in gone]
    if not trained:
        raise NotComparableError(
            f"The model has none of the {len(gone)} weights that stage '{stage.name}' trained "
            f"({', '.join(gone[:3])}{', ...' if len(gone) > 3 else ''}).",
            cause="its adapter was merged into the model, or the layers were replaced.",
            fix="analyze the model as it was at the end of that stage, with its adapter, or choose other `stages`.",
        )
    rates = _mean_rates(stage, np.array([recorded[name] for name in chosen]))
    states = []
    for number, name in enumerate(chosen):
        scales = _inverse_roots(stage, recorded, name)
        reach = {weight: rates[weight][number] * scales.get(weight, torch.ones(())) for weight in trained}
        states.append(StageState(_training(lineage, stage, name), reach))
    return states


def missing_trained(lineage: Lineage, stage: StageReader) -> list[str]:
    """Weights that the stage trained and the model does not have."""
    return sorted(_trained(stage).keys() - parameters_by_name(lineage.model).keys())


def _training(lineage: Lineage, stage: StageReader, name: str) -> TrainingState:
    if name in ("start", "end"):
        return lineage.start(stage) if name == "start" else lineage.end(stage)
    end = lineage.end(stage)
    here = parameters_by_name(lineage.model).keys()
    weights = {n: value for n, value in stage.snapshot(name).items() if n in here}
    buffers = {n: value for n, value in stage.buffers(name).items() if n in end.buffers}
    return TrainingState({**end.weights, **weights}, {**end.buffers, **buffers})


def _trained(stage: StageReader) -> dict[str, tuple[int, int]]:
    """The weights that an optimizer of the stage has: name -> number of the optimizer and of its group."""
    return {
        name: (number, place)
        for number, optimizer in enumerate(stage.meta["optimizers"])
        for place, group in enumerate(optimizer["groups"])
        for name in group["parameters"]
    }


def _mean_rates(stage: StageReader, at: np.ndarray) -> dict[str, np.ndarray]:
    """By weight, for each state: learning rates of the steps nearest to it, added up, over the number of all steps."""
    columns = ["step", "optimizer", "learning_rate", "beta1"]
    steps, optimizers = stage.steps().select(columns).to_pylist(), stage.meta["optimizers"]
    sums: dict[tuple[int, int], np.ndarray] = {}
    for row in steps:
        sgd = optimizers[row["optimizer"]]["class"].endswith(".SGD")
        nearest = int(np.abs(at - (row["step"] - 0.5)).argmin())
        for place, rate in enumerate(row["learning_rate"]):
            momentum = min(row["beta1"][place] or 0.0, 0.999) if sgd else 0.0
            total = sums.setdefault((row["optimizer"], place), np.zeros(len(at)))
            total[nearest] += rate / (1 - momentum) / len(steps)
    nothing = np.zeros(len(at))
    return {name: sums.get(group, nothing) for name, group in _trained(stage).items()}


def _inverse_roots(stage: StageReader, recorded: dict[str, int], name: str) -> dict[str, Tensor]:
    entries: list[dict[str, Any]] = [entry for entry in stage.meta["snapshots"] if "moments" in entry]
    if not entries:
        return {}
    nearest = min(entries, key=lambda entry: (abs(entry["step"] - recorded[name]), -entry["step"]))
    groups = stage.meta["optimizers"]
    found = {}
    for weight, moment in stage.moments(nearest["name"]).items():
        number, place = _trained(stage).get(weight, (0, 0))
        eps = groups[number]["groups"][place]["settings"].get("eps", 0.0)
        eps = eps if isinstance(eps, float) else 0.0
        found[weight] = torch.where(moment > 0, 1 / (moment.sqrt() + eps), 0.0)
    return found
