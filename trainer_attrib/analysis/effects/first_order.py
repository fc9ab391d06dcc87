"""The first-order estimator of stage effects: one vector per stage, scored against gradients of any behavior."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from trainer_attrib.analysis.displacement import Displacement, surviving_share
from trainer_attrib.analysis.effects.between_snapshots import BetweenSnapshots
from trainer_attrib.analysis.effects.estimate import Estimate, differences
from trainer_attrib.analysis.effects.lineage import Lineage
from trainer_attrib.analysis.effects.slopes import slopes_along
from trainer_attrib.analysis.stepping import can_merge
from trainer_attrib.errors import NotComparableError
from trainer_attrib.ledger.reader import StageReader
from trainer_attrib.tap.names import parameters_by_name

Of = Literal["updates", "data"]
ERROR_SCALE = 1.1
"""Brings four of five true errors within the bar: measured in six regimes on seeds that are not those of
``benchmarks/stage_effects.py`` (``docs/log.md``)."""


@dataclass(frozen=True)
class FirstOrder:
    """The derivative of a behavior with respect to scaling a stage's updates, taken as the effect of removing them.

    Each update counts by what later weight decay leaves of it; momentum and the schedule of learning rates are in the
    recorded updates. How later gradients would have changed (the Hessian) is left out, as is all curvature of the
    behavior (the family of Zhang et al. 2025, "Accountability Attribution"; a reconstruction, its paper's body was not
    at hand). A behavior of thousands of queries costs one product with the stage's embedding.

    The error bar of a query is its effect, or its distance to what is measured at weights moved by the same vector,
    whichever is larger: smaller bars miss the truth too often, so that nothing here is ever reliable.

    Args:
        of: ``"updates"`` scales the steps that were taken, ``"data"`` the gradients of the stage's data. Under Adam, or
            where every gradient was clipped, scaling all gradients changes nothing at all, so that this derivative is 0
            whatever the stage did; it is refused.
    """

    of: Of = "updates"

    name = "first_order"
    instead = "method='replay'"
    caveat = (
        "first_order is a derivative extrapolated to removing a whole stage: it holds for small stages at the end of "
        "training, and misjudges size and order of the others (see the benchmark stage_effects)"
    )

    def check(self, lineage: Lineage, stage: StageReader) -> None:
        """With ``of="data"``, scaling the gradients must change something.

        Raises:
            NotComparableError: it does not, or the optimizer is not one whose steps are known here.
        """
        if self.of == "data":
            _check_scalable(stage)

    def price(self, lineage: Lineage, stage: StageReader) -> float:
        """Nothing is run again."""
        return 0.0

    def estimate(self, lineage: Lineage, stage: StageReader) -> Estimate:
        """Inner products with the stage's embedding."""
        embedding = self.embedding(lineage, stage)
        effects: list[Tensor] = [slopes_along(lineage.model, behavior, embedding) for behavior in lineage.behaviors]
        removal = {name: -value for name, value in embedding.items()}
        moved = differences(lineage.final, lineage.measure_moved(removal))
        apart = differences(effects, moved)
        bars = [ERROR_SCALE * torch.maximum(e.abs(), a.abs()) for e, a in zip(effects, apart, strict=True)]
        return Estimate(effects, bars, "gradient . embedding", displacement=removal)

    def embedding(self, lineage: Lineage, stage: StageReader) -> Displacement:
        """What is left at the end of training of a stage's updates (or of its gradients' part in them), by weight name,
        float64. Its inner product with a behavior's gradient is the stage's effect to first order."""
        later, change = lineage.later(stage), lineage.timeline.change(stage)
        inside = _inside(stage) if can_merge(stage) else {}
        places = parameters_by_name(lineage.model)
        found = {}
        for name, whole in change.items():
            fits = name in inside and inside[name][0].shape == places[name].shape
            kept = inside[name][1 if self.of == "data" else 0] if fits else whole
            found[name] = surviving_share(later, name) * kept
        return found


def _inside(stage: StageReader) -> dict[str, tuple[Tensor, Tensor]]:
    """For each weight, at the stage's end: what is left of its updates, and of its gradients' part in them.

    Updates between two snapshots are shrunk by the decay from the second one on.
    """
    record, last = BetweenSnapshots(stage), stage.count("steps")
    steps = sorted({entry["step"] for entry in stage.meta["snapshots"]} | {0, last})
    start, end, whole = record.weights(0), record.weights(last), record.decay(0, last)
    updates = {name: 0 * value.double() for name, value in start.items()}
    for first, second in itertools.pairwise(steps):
        before, after, kept = record.weights(first), record.weights(second), record.decay(second, last)
        updates = {n: u + kept[n] * (after[n].double() - before[n].double()) for n, u in updates.items()}
    return {n: (u, end[n].double() - whole[n] * start[n].double()) for n, u in updates.items()}


def _check_scalable(stage: StageReader) -> None:
    kinds = [optimizer["class"] for optimizer in stage.meta["optimizers"]]
    clipped = [
        row["clip_threshold"] is not None and row["gradient_norm"] >= 0.999 * row["clip_threshold"]
        for row in stage.steps().select(["gradient_norm", "clip_threshold"]).to_pylist()
    ]
    why = ""
    if not all(kind.endswith(".SGD") for kind in kinds):
        why = f"it was trained by {kinds[0].rpartition('.')[2]}, whose steps do not depend on the size of its gradients"
    elif clipped and all(clipped):
        why = "every one of its gradients was clipped to the same norm"
    elif not can_merge(stage):
        why = "its optimizer is not one whose weight decay is known here"
    if why:
        raise NotComparableError(
            f"Scaling all data of stage '{stage.name}' is no measure of its effect: {why}.",
            cause="the derivative with respect to the weight of a whole stage's data is then 0 (homogeneity), although "
            "leaving the stage out changes the model; sums of the influences of all its examples are 0 for the same "
            "reason.",
            fix="use of='updates', or method='replay'.",
        )
