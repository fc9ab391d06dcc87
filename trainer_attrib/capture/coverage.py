"""Which layers were expected to fire, which did, and which weights are captured in full."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import nan
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from trainer_attrib.numerics.audit import regress
from trainer_attrib.tap.plan import SketchPlan, WeightPlan
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


def merged(reports: Iterable[Coverage]) -> Coverage:
    """The report of a stage from those of its optimizers."""
    first, *others = reports
    for other in others:
        silent, partial = first.silent | other.silent, first.partial | other.partial
        expected, share = first.expected + other.expected, first.share + other.share
        first = Coverage(expected, silent, partial, first.uncovered, share)
    return first


@dataclass(frozen=True)
class Evidence:
    """Of the first captured step, over all processes: the sum of all rows and the gradients' sketches, both [width],
    the modules whose gradient was seen, and why others were passed over."""

    captured: Tensor
    gradients: Tensor
    fired: set[str]
    skipped: dict[str, str]


def check_coverage(
    plan: SketchPlan, weights: Sequence[WeightPlan], parameters: dict[str, nn.Parameter], evidence: Evidence
) -> Coverage:
    """Audit every one of the weights and find the layers that stayed silent."""
    fired, skipped = evidence.fired, evidence.skipped
    expected = [module for weight in weights for module in weight.modules]
    silent = {m: skipped.get(m, "no gradient passed through its forward") for m in expected if m not in fired}
    audits = {w.name: _regressed(evidence.gradients[w.span], evidence.captured[w.span]) for w in weights}
    partial = {w.name: SILENT for w in weights if not fired & set(w.modules)} | _misfits(audits)
    uncovered = dict(plan.uncovered)
    return Coverage(len(expected), silent, partial, uncovered, _share(plan, weights, partial, parameters))


def _share(
    plan: SketchPlan, weights: Sequence[WeightPlan], partial: Mapping[str, str], parameters: dict[str, nn.Parameter]
) -> float:
    covered = {n for w in weights if w.name not in partial for n in (w.name, w.bias) if n}
    trainable = {name: p.numel() for name, p in parameters.items() if p.requires_grad}
    return sum(trainable.get(name, 0) for name in covered) / max(1, sum(trainable.values()))


def _regressed(gradient: Tensor, captured: Tensor) -> tuple[float, float]:
    scale, residual = regress(gradient, captured)
    return float(scale), float(residual)


def keep_columns(plan: SketchPlan, weights: Sequence[WeightPlan], like: Tensor) -> Tensor | None:
    """1 for the columns of these weights, 0 for the others; None if there are no others."""
    if len(weights) == len(plan.weights):
        return None
    keep = torch.zeros(plan.width, dtype=like.dtype, device=like.device)
    for weight in weights:
        keep[weight.span] = 1
    return keep


def gradient_sketch(weight: WeightPlan, parameters: dict[str, nn.Parameter], projections: Projections) -> Tensor | None:
    """Sketch of one weight's gradient, of the part that this process holds; None if the gradient is gone."""
    gradient = parameters[weight.name].grad
    bias = parameters[weight.bias].grad if weight.bias else None
    if gradient is None or gradient.is_sparse or (weight.bias and bias is None):
        return None
    return projections.sketch(weight, gradient, bias)


@dataclass(frozen=True)
class Audit:
    """One weight's gradient against a step's rows, both as sketches on the device.

    Where several processes train, each sees some of the rows and perhaps a part of the gradient: they are stored, and
    the reader of the ledger adds them up.
    """

    weight: str
    captured: Tensor
    gradient: Tensor | None
    alone: bool

    def to_row(self) -> dict[str, Any]:
        """Columns of the steps table. Waits for the device."""
        if self.alone and self.gradient is not None:
            scale, residual = regress(self.gradient, self.captured)
            return {"audit_weight": self.weight, "audit_scale": float(scale), "audit_residual": float(residual)}
        return {
            "audit_weight": self.weight,
            "captured_sketch": _bytes(self.captured),
            "gradient_sketch": None if self.gradient is None else _bytes(self.gradient),
        }


def _bytes(tensor: Tensor) -> bytes:
    return tensor.float().cpu().numpy().tobytes()


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
