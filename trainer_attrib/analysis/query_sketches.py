"""Queries as rows: the gradient of a behavior, sketched exactly as the training examples' gradients were."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from trainer_attrib.analysis.behavior import Behavior, evaluating
from trainer_attrib.errors import AnalysisError
from trainer_attrib.ledger.reader import StageReader
from trainer_attrib.tap.module_tap import ModuleTap
from trainer_attrib.tap.names import parameters_by_name
from trainer_attrib.tap.plan import SketchPlan
from trainer_attrib.tap.projections import Projections
from trainer_attrib.types import Layout


def sketch_queries(model: nn.Module, stage: StageReader, version: int, behaviors: Sequence[Behavior]) -> Tensor:
    """Sketches of the gradients of every query of every behavior at the model's current weights.

    They are scaled by the second moments of one version, and columns that the stage's rows leave out are zero, so that
    they can be compared with that version's rows and with no others.

    Returns:
        float32 [Q, width] on the CPU, Q counted over all behaviors in order.
    """
    plan = SketchPlan.from_dict(stage.meta["plan"])
    projections = Projections(plan, model, stage.factors(version), version)
    tap = ModuleTap(model, plan, projections, _raise)
    weights = [parameters_by_name(model)[weight.name] for weight in plan.weights]
    keep = _kept_columns(plan, stage)
    with evaluating(model), _trainable(weights):
        tap.attach()
        try:
            rows = [_sketch(tap, model, weights, b, q) for b in behaviors for q in range(len(b))]
        finally:
            tap.detach()
    return torch.stack(rows) * keep


def _sketch(tap: ModuleTap, model: nn.Module, weights: list[nn.Parameter], behavior: Behavior, query: int) -> Tensor:
    record = tap.open(1, Layout.ONE)
    with torch.enable_grad():
        value = behavior.value_of(model, query)
        if not value.requires_grad:
            raise AnalysisError(
                f"Behavior '{behavior.name}' has no gradient.",
                cause="its measure detaches, rounds or samples.",
                fix="influence needs a differentiable measure; for stage effects any measure will do.",
            )
        torch.autograd.grad(value, weights, allow_unused=True)  # only its hooks matter: nothing accumulates in .grad
    return record.sketches[0].float().cpu()


def _kept_columns(plan: SketchPlan, stage: StageReader) -> Tensor:
    keep = torch.ones(plan.width)
    partial = (stage.meta["coverage"] or {}).get("partial", {})
    for weight in plan.weights:
        if weight.name in partial:
            keep[weight.span] = 0
    return keep


@contextmanager
def _trainable(weights: list[nn.Parameter]) -> Iterator[None]:
    frozen = [weight for weight in weights if not weight.requires_grad]
    for weight in frozen:
        weight.requires_grad_(True)
    try:
        yield
    finally:
        for weight in frozen:
            weight.requires_grad_(False)


def _raise(fault: Exception) -> None:
    raise fault
