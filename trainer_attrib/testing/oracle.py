"""The oracle: one backward pass per example, its whole gradient formed, then projected. Slow and obviously right."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from trainer_attrib.tap.module_tap import ModuleTap
from trainer_attrib.tap.names import parameters_by_name
from trainer_attrib.tap.plan import SketchPlan, WeightPlan
from trainer_attrib.tap.projections import Projections
from trainer_attrib.testing.zoo import Inputs, Member
from trainer_attrib.types import Layout

Gradients = dict[str, Tensor]


def example_gradients(model: nn.Module, losses_of: Callable[[], Tensor], seed: int = 0) -> list[Gradients]:
    """The gradient of each example's own loss by parameter name.

    The whole batch runs once per example from the same random state, and one entry of the losses is differentiated:
    dropout masks are then those that the example met in its batch.

    Args:
        model: whose parameters to differentiate by.
        losses_of: runs the whole batch and returns its losses [B].
        seed: of the random state that every run starts from.
    """
    return [_gradients(model, losses_of, example, seed) for example in range(_count(losses_of, seed))]


def project_gradient(plan: SketchPlan, projections: Projections, gradients: Gradients) -> Tensor:
    """P_l G P_r^T of every weight, biases appended by copying: [width]."""
    parts = []
    for weight in plan.weights:
        pair = projections[weight.name]
        whole_RC = whole_weight(weight, gradients).to(pair.left.dtype)
        parts.append((pair.left @ whole_RC @ pair.right.T).flatten())
    return torch.cat(parts)


def whole_weight(weight: WeightPlan, tensors: Gradients) -> Tensor:
    """The tensor of a weight with its bias's appended, [R, C]."""
    matrix_RC = weight.matrix_of(tensors[weight.name])
    if not weight.bias:
        return matrix_RC
    return torch.cat([matrix_RC, tensors[weight.bias].unsqueeze(weight.bias_axis)], dim=weight.bias_axis)


def exact_sketches(member: Member, inputs: list[Inputs], projections: Projections, seed: int = 0) -> Tensor:
    """What the tap should have captured from a step over these inputs, [B, width]."""

    def losses_of() -> Tensor:
        return member.losses([member(**kwargs) for kwargs in inputs], inputs)

    gradients = example_gradients(member, losses_of, seed)
    return torch.stack([project_gradient(projections.plan, projections, g) for g in gradients])


def tapped_sketches(
    member: Member, inputs: list[Inputs], projections: Projections, seed: int = 0
) -> tuple[Tensor, dict[str, str]]:
    """What the tap captures from one backward of the batch's summed loss, [B, width], and what it skipped, with why."""
    with tap_of(member, projections) as tap:
        torch.manual_seed(seed)
        records, outputs = [], []
        for kwargs in inputs:
            records.append(tap.open(next(iter(kwargs.values())).shape[0], Layout.ROWS))
            outputs.append(member(**kwargs))
        member.losses(outputs, inputs).sum().backward()
    skipped = {name: why for record in records for name, why in record.skipped.items()}
    return torch.stack([record.sketches for record in records]).sum(0), skipped


@contextmanager
def tap_of(model: nn.Module, projections: Projections) -> Iterator[ModuleTap]:
    """A tap that raises its faults, detached at the end."""
    tap = ModuleTap(model, projections.plan, projections, _raise).attach()
    try:
        yield tap
    finally:
        tap.detach()


def _raise(fault: Exception) -> None:
    raise fault


def _count(losses_of: Callable[[], Tensor], seed: int) -> int:
    torch.manual_seed(seed)
    return len(losses_of())  # with gradients, as reentrant checkpoints warn without


def _gradients(model: nn.Module, losses_of: Callable[[], Tensor], example: int, seed: int) -> Gradients:
    """``backward`` rather than ``autograd.grad``, which reentrant checkpoints refuse. ``.grad`` is left as it was."""
    parameters = {name: p for name, p in parameters_by_name(model).items() if p.requires_grad}
    kept = {name: p.grad for name, p in parameters.items()}
    for p in parameters.values():
        p.grad = None
    torch.manual_seed(seed)
    losses_of()[example].backward()
    found = {n: torch.zeros_like(p) if p.grad is None else p.grad.detach().clone() for n, p in parameters.items()}
    for name, p in parameters.items():
        p.grad = kept[name]
    return found
