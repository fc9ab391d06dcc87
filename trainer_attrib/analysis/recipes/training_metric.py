"""How far training moved each weight per unit of gradient: the metric in which curvature and gradients are measured."""

from __future__ import annotations

from dataclasses import dataclass
from math import log

import torch
from torch import Tensor

from trainer_attrib.analysis.effects.between_snapshots import BetweenSnapshots
from trainer_attrib.analysis.stepping import can_merge
from trainer_attrib.ledger.reader import StageReader
from trainer_attrib.numerics.second_moment import append_bias, factor, inverse_root
from trainer_attrib.tap.plan import SketchPlan, WeightPlan

Scales = dict[str, tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class TrainingMetric:
    """Root of the metric as a b^T for every weight, and how much weight decay shrank all of them.

    Args:
        roots: a [R] and b [C] by weight name, float64, bias included.
        decay: sum over steps of learning rate times weight decay, mean over the weights.
    """

    roots: Scales
    decay: float


def training_metric(stage: StageReader, plan: SketchPlan) -> TrainingMetric | None:
    """The metric of a whole stage; None where its optimizer is not one whose steps are known (SGD, Adam, AdamW)."""
    if not can_merge(stage) or len(stage.meta["optimizers"]) != 1:
        return None
    record, steps = BetweenSnapshots(stage), stage.count("steps")
    metric, left = record.metric(0, steps), record.decay(0, steps)
    shapes = {name: entry["shape"] for name, entry in stage.weights_at("end").items()}
    known = [w for w in plan.weights if w.name in metric]
    if len(known) < len(plan.weights):
        return None
    roots = {w.name: _roots(w, metric, shapes) for w in known}
    decay = sum(-log(max(float(left[w.name]), 1e-300)) for w in known) / len(known)
    return TrainingMetric(roots, max(0.0, decay))


def _roots(weight: WeightPlan, metric: dict[str, Tensor], shapes: dict[str, list[int]]) -> tuple[Tensor, Tensor]:
    """Factored as the second moment 1 / metric^2 is: of the two roots the mean of small entries is dominated by."""
    moment = weight.matrix_of(_moment(metric[weight.name], shapes[weight.name]))
    rows, columns = factor(moment)
    if weight.bias:
        bias = _moment(metric[weight.bias], shapes[weight.bias]) if weight.bias in metric else moment.mean().expand(1)
        rows, columns = append_bias(rows, columns, bias, weight.bias_axis)
    a, b = inverse_root(rows, columns)
    return a.sqrt(), b.sqrt()


def _moment(metric: Tensor, shape: list[int]) -> Tensor:
    """What the weight's gradients would have to be divided by the root of; 0 where it did not move."""
    metric = metric.double().expand(shape)
    return torch.where(metric > 0, metric.clamp_min(1e-150) ** -2, 0.0)
