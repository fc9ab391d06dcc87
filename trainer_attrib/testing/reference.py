"""What a :class:`Run` should leave in the ledger: the run once more in float64, by one backward pass per example."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from trainer_attrib.ledger.reader import StageReader
from trainer_attrib.tap.plan import SketchPlan
from trainer_attrib.tap.projections import Projections
from trainer_attrib.testing.oracle import Gradients, example_gradients, project_gradient
from trainer_attrib.testing.run import Classifier, Run


@dataclass(frozen=True)
class ReferenceStep:
    """One executed update.

    Args:
        examples: id and own gradient of each example, by micro-batch.
        denominators: by what each micro-batch's losses were divided.
        loss: mean over the window.
        gradient_norm: of the gradient that the optimizer used, after clipping.
        settings: of each parameter group, as the step used them.
        weights: after the step.
        epoch: passes over the data completed before.
    """

    examples: list[list[tuple[str, Gradients]]]
    denominators: list[int]
    loss: float
    gradient_norm: float
    settings: list[dict[str, Any]]
    weights: Gradients
    epoch: int


def reference_steps(run: Run) -> list[ReferenceStep]:
    """All steps of a run without dropout, in the order of its examples; none where its loss overflows a scaler."""
    assert not run.shuffle
    assert not run.dropout
    model = replace(run, dtype=torch.float64, breaks_at=0).model()
    optimizer, schedule = run.tuning(model.parameters())
    steps, seen = [], 0
    for epoch, window in _windows(run):
        first, seen = seen + 1, seen + len(window)
        if first <= run.overflow_at <= seen:
            continue
        settings = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
        examples, denominators, losses = [], [], []
        for batch in window:
            gradients, loss = _own_gradients(model, batch)
            examples.append(list(zip(batch["id"], gradients, strict=True)))
            denominators.append(len(gradients) * run.accumulate)
            losses.append(loss / run.accumulate)
        norm = _set_gradient(model, examples, denominators, run.clip)
        optimizer.step()
        schedule.step()
        weights = {name: p.detach().clone() for name, p in model.named_parameters()}
        steps.append(ReferenceStep(examples, denominators, sum(losses), norm, settings, weights, epoch))
    return steps


def _windows(run: Run) -> Iterator[tuple[int, list[Any]]]:
    """(epoch, micro-batches of one optimizer step); a window ends with its epoch."""
    epochs = itertools.count() if run.epochs is None else range(run.epochs)
    loader = replace(run, workers=0).loader()
    windows = ((epoch, window) for epoch in epochs for window in _batched(list(loader), run.accumulate))
    return itertools.islice(windows, run.max_steps)


def _batched(batches: list[Any], size: int) -> list[list[Any]]:
    return [batches[start : start + size] for start in range(0, len(batches), size)]


def _own_gradients(model: Classifier, batch: dict[str, Any]) -> tuple[list[Gradients], float]:
    def losses_of() -> Tensor:
        return model.example_losses(batch["input_ids"], batch["labels"])

    return example_gradients(model, losses_of), float(losses_of().detach().mean())


def _set_gradient(model: nn.Module, examples: Any, denominators: list[int], clip: float | None) -> float:
    """Put the window's mean gradient, clipped, where the optimizer reads it; returns its norm."""
    for name, p in model.named_parameters():
        terms = [g[name] / d for micro, d in zip(examples, denominators, strict=True) for _, g in micro]
        p.grad = torch.stack(terms).sum(0)
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    norm = float(torch.stack([g.norm() for g in gradients]).norm())
    scale = 1.0 if clip is None else min(1.0, clip / (norm + 1e-6))  # torch.nn.utils.clip_grad_norm_'s own formula
    for gradient in gradients:
        gradient.mul_(scale)
    return norm * scale


class Expected:
    """Rows and projected weights in the layout of a recorded stage.

    The integration may hold the model inside a module of its own: recorded names then begin with that module's.
    """

    def __init__(self, run: Run, stage: StageReader) -> None:
        self._stage, self._plan = stage, SketchPlan.from_dict(stage.meta["plan"])
        own = replace(run, dtype=torch.float64, breaks_at=0).model()
        names = [name for name, _ in own.named_parameters()]
        recorded = self._plan.weights[0].name
        self._prefix = recorded.removesuffix(next(name for name in names if recorded.endswith(name)))
        self._holder: nn.Module = own
        for part in reversed(self._prefix.split(".")[:-1]):
            outer = nn.Module()
            outer.add_module(part, self._holder)
            self._holder = outer
        self._raw = Projections(self._plan, self._holder)

    def row(self, gradient: Gradients, version: int = 0) -> Tensor:
        """The sketch [width] of one example's own gradient, scaled by a recorded version of the second moments."""
        return self._project(gradient, self._projections(version))

    def weights(self, weights: Gradients) -> Tensor:
        """The projected weights [width] of a step."""
        return self._project(weights, self._raw)

    def _projections(self, version: int) -> Projections:
        if not version:
            return self._raw
        return Projections(self._plan, self._holder, self._stage.factors(version), version)

    def _project(self, tensors: Gradients, projections: Projections) -> Tensor:
        return project_gradient(self._plan, projections, {self._prefix + name: t for name, t in tensors.items()})
