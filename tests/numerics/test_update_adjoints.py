"""Adjoints of the updates are the transposes of their tangents; the adjoint of clipping is what autograd says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.numerics.test_update_rules import ADAMW, SGD
from trainer_attrib.numerics.clipping import Clipping, clipping_of
from trainer_attrib.numerics.update_adjoints import adamw_adjoint, sgd_adjoint
from trainer_attrib.numerics.update_rules import AdamWSettings, AdamWState, SGDState, adamw_tangent, sgd_tangent

pytestmark = pytest.mark.usefixtures("float64")


def _inner(first: Any, second: Any) -> Tensor:
    return torch.stack([(a * b).sum() for a, b in zip(first, second, strict=True)]).sum()


@pytest.mark.parametrize("step", [1, 2, 7])
@pytest.mark.parametrize("name", ADAMW)
def test_adamw_adjoints_are_the_transposes_of_its_tangents(name: str, step: int) -> None:
    settings, gradient, change = ADAMW[name], torch.randn(5, 7), torch.randn(5, 7)
    state = AdamWState(torch.randn(5, 7), 0.1 * torch.randn(5, 7), torch.rand(5, 7) + 0.1)
    of_state, adjoint = (AdamWState(*torch.randn(3, 5, 7)) for _ in range(2))
    forwards = adamw_tangent(state, gradient, of_state, change, settings, step)
    before, of_gradient = adamw_adjoint(state, gradient, adjoint, settings, step)
    torch.testing.assert_close(_inner(adjoint, forwards), _inner(before, of_state) + (of_gradient * change).sum())


@pytest.mark.parametrize("step", [1, 2])
@pytest.mark.parametrize("name", SGD)
def test_sgd_adjoints_are_the_transposes_of_its_tangents(name: str, step: int) -> None:
    settings, change = SGD[name], torch.randn(5, 7)
    of_state, adjoint = (SGDState(*torch.randn(2, 5, 7)) for _ in range(2))
    forwards = sgd_tangent(of_state, change, settings, step)
    before, of_gradient = sgd_adjoint(adjoint, settings, step)
    torch.testing.assert_close(_inner(adjoint, forwards), _inner(before, of_state) + (of_gradient * change).sum())


def test_adjoints_of_many_queries_are_those_of_each() -> None:
    settings, gradient = ADAMW["decay"], torch.randn(5, 7)
    state = AdamWState(torch.randn(5, 7), torch.randn(5, 7), torch.rand(5, 7))
    adjoints = AdamWState(*torch.randn(3, 4, 5, 7))
    together, of_gradient = adamw_adjoint(state, gradient, adjoints, settings, 3)
    for query in range(4):
        one, alone = adamw_adjoint(state, gradient, AdamWState(*(part[query] for part in adjoints)), settings, 3)
        torch.testing.assert_close(alone, of_gradient[query], rtol=1e-14, atol=0)
        for whole, part in zip(together, one, strict=True):
            torch.testing.assert_close(part, whole[query], rtol=1e-14, atol=0)


def test_an_unseen_weight_has_a_finite_adjoint() -> None:
    """The root of its second moment is 0 and has no derivative."""
    zero, ones = torch.zeros(3), torch.ones(3)
    before, of_gradient = adamw_adjoint(
        AdamWState(ones, zero, zero), zero, AdamWState(ones, ones, ones), AdamWSettings(learning_rate=0.1), 1
    )
    assert all(bool(torch.isfinite(part).all()) for part in (*before, of_gradient))


# ---- clipping --------------------------------------------------------------------------------------------------------


def _to_norm(bound: float) -> Callable[[list[Tensor]], list[Tensor]]:
    def clip(gradient: list[Tensor]) -> list[Tensor]:
        norm = torch.stack([part.square().sum() for part in gradient]).sum().sqrt()
        return [part * (bound / (norm + 1e-6)).clamp(max=1) for part in gradient]

    return clip


CLIPS: dict[str, Callable[[list[Tensor]], list[Tensor]]] = {
    "norm": _to_norm(0.7),
    "norm, not reached": _to_norm(1e3),
    "value": lambda gradient: [part.clamp(-0.5, 0.5) for part in gradient],
    "value, not reached": lambda gradient: [part.clamp(-50, 50) for part in gradient],
}


@pytest.mark.parametrize("name", CLIPS)
def test_the_adjoint_of_clipping_is_autograds(name: str) -> None:
    before = [torch.randn(4, 3, requires_grad=True), torch.randn(5, requires_grad=True)]
    after = CLIPS[name](before)
    adjoints = [torch.randn(2, 4, 3), torch.randn(2, 5)]
    expected = [torch.autograd.grad(after, before, [a[q] for a in adjoints], retain_graph=True) for q in range(2)]
    found = clipping_of([b.detach() for b in before], [a.detach() for a in after])
    assert found is not None
    assert (found == Clipping()) == name.endswith("not reached")
    pulled = found.adjoint([b.detach() for b in before], adjoints)
    for query in range(2):
        for part, whole in zip(pulled, expected[query], strict=True):
            torch.testing.assert_close(part[query], whole, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("bound", [0.3, 30.0])
def test_what_torch_clips_is_recognised(bound: float) -> None:
    weight = torch.nn.Parameter(torch.randn(6, 2))
    weight.grad = torch.randn(6, 2)
    before = weight.grad.clone()
    norm = torch.nn.utils.clip_grad_norm_([weight], bound)
    found = clipping_of([before], [weight.grad])
    assert found is not None
    assert found.factor == pytest.approx(min(1.0, bound / (float(norm) + 1e-6)), rel=1e-12)


def test_clippings_of_another_kind_are_not_guessed() -> None:
    before = [torch.tensor([3.0, 0.2]), torch.tensor([-0.1, 4.0])]
    each = [part / part.norm() for part in before]
    signs = [part.sign() for part in before]
    larger = [2 * part for part in before]
    assert [clipping_of(before, after) for after in (each, signs, larger)] == [None, None, None]
