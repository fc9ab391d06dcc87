"""Which layers were expected to fire, which did, and which weights are captured in full."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from math import nan
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from trainer_attrib.capture.window import Window
from trainer_attrib.numerics.audit import regress
from trainer_attrib.tap.plan import SketchPlan, WeightPlan, parameters_by_name
from trainer_attrib.tap.projections import Projections

AUDIT_LIMIT = 1e-2  # float32 leaves about 1e-6, bf16 about 4e-3, a missed contribution 0.1 and more

SCALE_LIMIT = 0.05  # of a weight's audit scale, around the usual one
SILENT = "none of its layers fired"


@dataclass(frozen=True)
class Coverage:
    """The report of the first optimizer step.

    Args:
        expected: modules that were hooked.
        silent: hooked modules without a gradient -> why.
        partial: weights that another path trains too (audit residual), left out of the rows.
        uncovered: trainable parameters that no hooked module owns -> why.
        share: of the trainable parameters' numbers, how much the rows cover.
    """

    expected: int
    silent: dict[str, str]
    partial: dict[str, str]
    uncovered: dict[str, str]
    share: float

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)

    def lines(self) -> list[str]:
        """The report as a person reads it."""
        fired = self.expected - len(self.silent)
        lines = [f"{fired} of {self.expected} layers fired; rows cover {self.share:.1%} of the trainable parameters"]
        lines += [f"  silent: {name}: {why}" for name, why in self.silent.items()]
        return lines + [f"  left out: {name}: {why}" for name, why in self.partial.items() if why != SILENT]


def check_coverage(model: nn.Module, plan: SketchPlan, projections: Projections, window: Window) -> Coverage:
    """Audit every weight of the first captured step and find the layers that stayed silent."""
    fired: set[str] = set()
    skipped: dict[str, str] = {}
    for micro in window.micro_batches:
        fired |= micro.record.backwards.keys()
        skipped |= micro.record.skipped
    expected = [module for weight in plan.weights for module in weight.modules]
    silent = {m: skipped.get(m, "no gradient passed through its forward") for m in expected if m not in fired}
    captured = window.captured()
    parameters = parameters_by_name(model)
    audits = {}
    for weight in plan.weights:
        found = None if captured is None else audit(weight, captured, parameters, projections)
        audits[weight.name] = (nan, nan) if found is None else (float(found[0]), float(found[1]))
    partial = {w.name: SILENT for w in plan.weights if not fired & set(w.modules)} | _misfits(audits)
    covered = {n for w in plan.weights if w.name not in partial for n in (w.name, w.bias) if n}
    trainable = {name: p.numel() for name, p in parameters.items() if p.requires_grad}
    share = sum(trainable.get(name, 0) for name in covered) / max(1, sum(trainable.values()))
    return Coverage(len(expected), silent, partial, dict(plan.uncovered), share)


def keep_columns(plan: SketchPlan, coverage: Coverage, like: Tensor) -> Tensor | None:
    """1 for the columns of weights captured in full, 0 for the others; None if there are no others."""
    if not coverage.partial:
        return None
    keep = torch.ones(plan.width, dtype=like.dtype, device=like.device)
    for weight in plan.weights:
        if weight.name in coverage.partial:
            keep[weight.span] = 0
    return keep


def audit(
    weight: WeightPlan, captured: Tensor, parameters: dict[str, nn.Parameter], projections: Projections
) -> tuple[Tensor, Tensor] | None:
    """Scale and residual of one weight's gradient against the captured rows; None if the gradient is gone."""
    gradient = parameters[weight.name].grad
    bias = parameters[weight.bias].grad if weight.bias else None
    if gradient is None or gradient.is_sparse or (weight.bias and bias is None):
        return None
    return regress(projections.sketch(weight, gradient, bias), captured[weight.span])


def _misfits(audits: dict[str, tuple[float, float]]) -> dict[str, str]:
    """Weights whose rows are not their gradient -> why, from the scale and residual of every weight.

    What acts after the backward pass (clipping, loss scale, averaging) acts on all weights alike, so that a weight with
    a scale of its own has a layer that multiplies by something its rule knows nothing of.
    """
    found = {
        name: f"its layers explain its gradient only up to a residual of {residual:.2f}"
        for name, (_, residual) in audits.items()
        if residual > AUDIT_LIMIT
    }
    scales = {name: scale for name, (scale, _) in audits.items() if scale == scale and name not in found}
    usual = median(scales.values()) if len(scales) > 2 else nan
    return found | {
        name: f"its gradient is {scale / usual:.3g} times what its layer's inputs and outputs explain"
        for name, scale in scales.items()
        if abs(scale / usual - 1) > SCALE_LIMIT
    }
