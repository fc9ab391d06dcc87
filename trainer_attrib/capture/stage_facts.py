"""The facts written beside the rows: of a stage, before it starts, and of each step."""

from __future__ import annotations

import operator
import platform
from collections import Counter
from collections.abc import Sequence
from importlib import metadata
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from trainer_attrib.capture.loss_facts import loss_lines
from trainer_attrib.capture.moment_readers import correction_unavailable
from trainer_attrib.capture.optimizer_tap import describe_optimizer, group_settings
from trainer_attrib.capture.window import Window
from trainer_attrib.ledger.links import Link
from trainer_attrib.ledger.row_codecs import row_codec
from trainer_attrib.tap.adapters import low_rank_updates
from trainer_attrib.tap.names import adapter_weights, parameters_by_name
from trainer_attrib.tap.plan import SketchPlan
from trainer_attrib.tap.shards import shard_of
from trainer_attrib.types import Correction, SketchConfig
from trainer_attrib.version import __version__

_FRAMEWORKS = ("torch", "transformers", "accelerate", "trl", "peft", "lightning", "pytorch-lightning", "datasets")


def stage_facts(
    model: nn.Module, optimizers: Sequence[Optimizer], plan: SketchPlan, sketch: SketchConfig, trainable: set[str]
) -> dict[str, Any]:
    """What ``stage.json`` says from the start."""
    names = {id(parameter): name for name, parameter in parameters_by_name(model).items()}
    return {
        "format": row_codec(sketch.dtype, plan.row_blocks).format,
        "model": type(model).__name__,
        "trainable": sorted(trainable),
        "adapters": sorted(adapter_weights(model)),
        "low_rank_updates": low_rank_updates(model),
        "optimizers": [describe_optimizer(optimizer, names) for optimizer in optimizers],
        "sketch": sketch.to_dict(),
        "correction_unavailable": _why_raw(optimizers, sketch),
        "plan": plan.to_dict(),
        "width": plan.row_width,
        "row_blocks": plan.row_blocks,
        "coverage": None,
        "overhead": None,
        "weights_replaced": False,
        "versions_of": _software(),
    }


def _why_raw(optimizers: Sequence[Optimizer], sketch: SketchConfig) -> str:
    if sketch.correction != Correction.FACTORED:
        return ""
    return "; ".join(dict.fromkeys(reason for o in optimizers if (reason := correction_unavailable(o))))


def preflight_lines(stage: str, plan: SketchPlan, sketch: SketchConfig, meta: dict[str, Any]) -> list[str]:
    """What recording will cost, said before the first step."""
    size = row_codec(sketch.dtype, plan.row_blocks).record.itemsize
    of_sample = f" for {100 * sketch.sample:g}% of the examples" if sketch.sample < 1 else ""
    layers = sum(len(w.modules) for w in plan.weights)
    lines = [
        f"stage '{stage}' ({Link.of(meta)}): {len(plan.weights)} weights in {layers} layers, "
        f"{size / 1024:.1f} KiB per example{of_sample}, expected overhead at least "
        f"{100 * flop_share(plan) / sketch.every_n_steps:.1f}% of the matrix products"
    ]
    lines += [
        f"stage '{stage}': {n} parameters not covered: {why}" for why, n in Counter(plan.uncovered.values()).items()
    ]
    if meta["correction_unavailable"]:
        lines.append(f"stage '{stage}': correction unavailable: {meta['correction_unavailable']}")
    if left_out := meta["optimizer_state_left_out"]:
        lines.append(
            f"stage '{stage}': the optimizer brings a state along, of which {len(left_out)} entries cannot be stored "
            f"({left_out[0]}, ...)"
        )
    return lines + [f"stage '{stage}': {line}" for line in loss_lines(meta)]


def closing_line(stage: str, status: str, sealed: dict[str, int], left_out: int, share: float | None) -> str:
    """What was recorded, by this process, and what it cost, said when a stage ends."""
    cost = "" if share is None else f"; capture took {100 * share:.1f}% of the training's time"
    recorded = f"{sealed['rows']:,} rows of {sealed['steps']:,} steps, {sealed['bytes'] / 1e6:.1f} MB"
    missing = f", without the rows of {left_out:,} steps that the disk was too slow for" if left_out else ""
    return f"stage '{stage}' {status}: {recorded}{missing}{cost}"


def flop_share(plan: SketchPlan) -> float:
    """Lower bound of the overhead: FLOPs of the sketches over those of the captured layers' forward and backward.

    Per token, sketching a weight costs 2K(R + C) + 2K^2 and training it 6RC (one product forward, two backward).
    """
    uses = [(w, len(w.modules)) for w in plan.weights]
    sketching = sum(n * (2 * w.left * w.rows + 2 * w.right * w.columns + 2 * w.size) for w, n in uses)
    return sketching / sum(n * 6 * w.rows * w.columns for w, n in uses)


def snapshot_steps(count: int, total: int | None) -> list[int]:
    """Steps of the snapshots inside a stage, evenly spaced; none if its length is unknown."""
    if not total:
        return []
    steps = [round(total * (k + 1) / (count + 1)) for k in range(count)]
    return sorted({step for step in steps if 0 < step < total})


def step_row(step: int, optimizer: Optimizer, micro_batches: int, version: int) -> dict[str, Any]:
    """One row of the steps table, as far as it is known without waiting for the device."""
    groups = group_settings(optimizer)
    return {
        "step": step,
        "skipped": False,
        "micro_batches": micro_batches,
        "captured": micro_batches > 0,
        "learning_rate": [g.learning_rate for g in groups],
        "weight_decay": [g.weight_decay for g in groups],
        "beta1": [g.beta1 for g in groups],
        "beta2": [g.beta2 for g in groups],
        "version": version,
    }


def step_scalars(gradients: list[Tensor], window: Window) -> dict[str, Tensor]:
    """The step's numbers that live on the device; of a sharded gradient the norm of this process's part."""
    scalars = {}
    local = [shard_of(gradient).local for gradient in gradients]
    if local and all(map(operator.is_, local, gradients)) and (told := window.used_norm()) is not None:
        scalars["gradient_norm"] = told  # clipping read all gradients already: a second time costs 0.6 % of a step
    elif local:
        scalars["gradient_norm"] = torch.nn.utils.get_total_norm(local)
    if window.losses:
        scalars["loss"] = torch.stack([loss.float() for loss in window.losses]).sum()
    return scalars


def _software() -> dict[str, str]:
    found = {"trainer-attrib": __version__, "python": platform.python_version()}
    for name in _FRAMEWORKS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
