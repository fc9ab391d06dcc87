"""Products of curvature against matrices that autograd computes entry by entry."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from trainer_attrib.analysis.curvature import Curvature
from trainer_attrib.tap.names import parameters_by_name

pytestmark = pytest.mark.usefixtures("float64")


class Net(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.drop, self.head = nn.Linear(4, 5), nn.Dropout(dropout), nn.Linear(5, 3)

    def forward(self, x):
        return self.head(self.drop(torch.tanh(self.body(x))))


def data(count: int = 6):
    generator = torch.Generator().manual_seed(3)
    return torch.randn(count, 4, generator=generator), torch.arange(count) % 3


def flat(tensors) -> torch.Tensor:
    return torch.cat([t.reshape(-1) for t in tensors])


def matrix_of(curvature: Curvature, parameters) -> torch.Tensor:
    columns = []
    for at in range(sum(p.numel() for p in parameters)):
        unit = torch.zeros(sum(p.numel() for p in parameters))
        unit[at] = 1
        parts = unit.split([p.numel() for p in parameters])
        columns.append(flat(curvature.product([v.view_as(p) for v, p in zip(parts, parameters, strict=True)])))
    return torch.stack(columns, 1)


def at_weights(model: nn.Module, function):
    """The function of the flat weights that ``function(call)`` is, and the weights at which the model stands."""
    names = parameters_by_name(model)
    sizes = [p.numel() for p in names.values()]

    def of(weights):
        parts = weights.split(sizes)
        values = {n: v.view_as(p) for (n, p), v in zip(names.items(), parts, strict=True)}
        return function(lambda *inputs: functional_call(model, values, inputs))

    return of, flat(names.values()).detach()


def gauss_newton(model: nn.Module, x, loss_of_logits) -> torch.Tensor:
    logits, weights = at_weights(model, lambda call: call(x).reshape(-1))
    jacobian = torch.autograd.functional.jacobian(logits, weights)
    hessian = torch.autograd.functional.hessian(lambda z: loss_of_logits(z.view(len(x), -1)), logits(weights).detach())
    return jacobian.T @ hessian @ jacobian


LOSSES = {
    "cross entropy": F.cross_entropy,
    "squares": lambda out, y: (out - F.one_hot(y, 3)).square().mean(),
    "scaled": lambda out, y: 0.25 * F.cross_entropy(out, y, label_smoothing=0.1),
}


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_products_are_those_of_the_gauss_newton_matrix(loss):
    model, (x, y) = Net(), data()
    parameters = list(model.parameters())
    found = matrix_of(Curvature(model, [lambda: loss(model(x), y)], parameters), parameters)
    expected = gauss_newton(model, x, lambda z: loss(z, y))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
    assert expected.abs().max() > 1e-2


def test_micro_batches_add_up():
    model, (x, y) = Net(), data()
    parameters = list(model.parameters())
    parts = [lambda part=part: F.cross_entropy(model(x[part]), y[part]) / 2 for part in (slice(0, 2), slice(2, 6))]
    expected = sum(
        gauss_newton(model, x[p], lambda z, p=p: F.cross_entropy(z, y[p]) / 2) for p in (slice(0, 2), slice(2, 6))
    )
    torch.testing.assert_close(matrix_of(Curvature(model, parts, parameters), parameters), expected)


def test_a_loss_of_two_passes_has_the_curvature_between_them():
    """Of pairs: the loss depends on the outputs of one call together with those of another."""
    model, (x, _) = Net(), data()
    parameters = list(model.parameters())

    def loss_of(first, second):
        return -F.logsigmoid(first - second).mean()

    both, weights = at_weights(model, lambda call: torch.stack([call(x[:3]), call(x[3:])]).reshape(-1))
    jacobian = torch.autograd.functional.jacobian(both, weights)
    hessian = torch.autograd.functional.hessian(lambda z: loss_of(*z.view(2, 3, 3)), both(weights).detach())
    found = matrix_of(Curvature(model, [lambda: loss_of(model(x[:3]), model(x[3:]))], parameters), parameters)
    torch.testing.assert_close(found, jacobian.T @ hessian @ jacobian)


class ReturnsLoss(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = Net()

    def forward(self, x, y):
        return F.cross_entropy(self.net(x), y)


@pytest.mark.parametrize("outside", [False, True], ids=["the model returns its loss", "a function of the weights"])
def test_without_outputs_products_are_those_of_the_hessian(outside):
    model, (x, y) = ReturnsLoss(), data()
    parameters = list(model.parameters())

    def outside_loss():
        hidden = torch.tanh(x @ model.net.body.weight.T + model.net.body.bias)
        return F.cross_entropy(hidden @ model.net.head.weight.T + model.net.head.bias, y)

    loss = outside_loss if outside else lambda: model(x, y)
    function, weights = at_weights(model, lambda call: call(x, y))
    expected = torch.autograd.functional.hessian(function, weights)
    found = matrix_of(Curvature(model, [loss], parameters), parameters)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)


class Once(torch.autograd.Function):
    """A fused loss: its gradient comes with it and cannot be differentiated again."""

    @staticmethod
    def forward(ctx, logits, y):
        with torch.enable_grad():
            leaf = logits.detach().requires_grad_()
            loss = F.cross_entropy(leaf, y)
            ctx.save_for_backward(torch.autograd.grad(loss, leaf)[0])
        return loss.detach()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *slopes):  # pyright: ignore[reportIncompatibleMethodOverride]
        return slopes[0] * ctx.saved_tensors[0], None


def test_without_second_derivatives_gradients_are_differenced():
    model, (x, y) = Net(dropout=0.4), data()
    parameters = list(model.parameters())
    before = [p.detach().clone() for p in parameters]
    curvature = Curvature(model, [lambda: Once.apply(model(x), y)], parameters, seed=5)
    found = matrix_of(curvature, parameters)

    def with_the_same_dropout(call):
        torch.manual_seed(5)
        return F.cross_entropy(call(x), y)

    function, weights = at_weights(model, with_the_same_dropout)
    expected = torch.autograd.functional.hessian(function, weights)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)
    assert all(torch.equal(p, b) for p, b in zip(parameters, before, strict=True))
    assert all(p.grad is None for p in parameters)


def test_frozen_parameters_take_part_and_stay_frozen():
    model, (x, y) = Net(), data()
    model.body.requires_grad_(False)
    parameters = list(model.parameters())
    found = matrix_of(Curvature(model, [lambda: F.cross_entropy(model(x), y)], parameters), parameters)
    torch.testing.assert_close(found, gauss_newton(model, x, lambda z: F.cross_entropy(z, y)))
    assert [p.requires_grad for p in parameters] == [False, False, True, True]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_random_numbers_and_dropout_masks_stay():
    model, (x, y) = Net(dropout=0.5), data()
    parameters, state = list(model.parameters()), torch.get_rng_state()
    curvature = Curvature(model, [lambda: F.cross_entropy(model(x), y)], parameters, seed=1)
    vector = [torch.ones_like(p) for p in parameters]
    assert torch.equal(flat(curvature.product(vector)), flat(curvature.product(vector)))
    again = Curvature(model, [lambda: F.cross_entropy(model(x), y)], parameters, seed=1)
    other = Curvature(model, [lambda: F.cross_entropy(model(x), y)], parameters, seed=2)
    assert torch.equal(flat(curvature.product(vector)), flat(again.product(vector)))
    assert not torch.allclose(flat(curvature.product(vector)), flat(other.product(vector)))
    assert torch.equal(state, torch.get_rng_state())


def test_language_models_with_their_own_loss_and_fast_attention(tiny_gpt2, close):
    """The loss is computed inside the model; fast attention has no second derivative, its plain form is used."""
    model = tiny_gpt2(attn_implementation="sdpa").double()
    tokens = torch.randint(2, 29, (2, 6), generator=torch.Generator().manual_seed(0))
    parameters = list(model.parameters())
    generator = torch.Generator().manual_seed(1)
    vector = [torch.randn(p.shape, generator=generator) for p in parameters]
    found = Curvature(model, [lambda: model(input_ids=tokens, labels=tokens).loss], parameters).product(vector)

    from torch.func import jvp, vjp
    from torch.nn.attention import SDPBackend, sdpa_kernel

    names = [name for name, _ in model.named_parameters()]

    def logits_at(*values):
        return functional_call(model, dict(zip(names, values, strict=True)), (tokens,)).logits

    def loss_of(z):
        return F.cross_entropy(z[:, :-1].reshape(-1, z.shape[-1]), tokens[:, 1:].reshape(-1))

    with sdpa_kernel(SDPBackend.MATH):
        logits, pushed = jvp(logits_at, tuple(parameters), tuple(vector))[:2]
        curved = torch.autograd.functional.hvp(loss_of, logits.detach(), pushed.detach())[1]
        expected = vjp(logits_at, *parameters)[1](curved)
    close(flat(found), flat(expected).detach(), 1e-6)  # the model computes its loss in float32
