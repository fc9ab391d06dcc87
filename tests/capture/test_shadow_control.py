"""The gradient of a whole batch at a shadow's weights, from a part: right in the mean, and nearer than without."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from trainer_attrib.capture.shadows.control import MEMORY, Compared, Control

Gradients = dict[str, Tensor]


def batch(likeness: float, generator: torch.Generator) -> tuple[Gradients, Gradients]:
    """Gradients of 32 examples at the model's weights and at the shadow's, [32, P]; ``likeness``: correlation."""

    def drawn(size: int) -> Tensor:
        return torch.randn(32, size, generator=generator, dtype=torch.float64)

    model = {"a": drawn(40) + 0.2, "b": drawn(7)}
    shadow = {n: likeness * g + (1 - likeness**2) ** 0.5 * (drawn(g.shape[1]) + 0.2) for n, g in model.items()}
    return model, shadow


def mean(gradients: Gradients, count: int = 32) -> Gradients:
    return {name: gradient[:count].mean(0) for name, gradient in gradients.items()}


def squared_error(found: Gradients, true: Gradients) -> float:
    return sum(float((found[name] - value).square().sum()) for name, value in true.items())


@pytest.mark.parametrize("likeness", [0.0, 0.5, 0.9, 1.0])
def test_it_errs_no_more_than_the_part_alone_or_the_whole_difference(likeness: float) -> None:
    """The coefficient that is learned is the correlation (both gradients vary alike), and the best there is."""
    generator, control, steps = torch.Generator().manual_seed(3), Control(), 300
    errors = {"learned": 0.0, "none": 0.0, "all": 0.0}
    coefficients = []
    for _ in range(steps):
        model, shadow = batch(likeness, generator)
        part, whole, true = Compared(mean(model, 8), mean(shadow, 8)), mean(model), mean(shadow)
        found = control.applied(part, whole, learn=True)
        errors["learned"] += squared_error(found, true) / steps
        errors["none"] += squared_error(part.shadow, true) / steps
        errors["all"] += squared_error({n: part.shadow[n] - part.factual[n] + whole[n] for n in whole}, true) / steps
        coefficients.append(float(control.coefficient))
    assert sum(coefficients[20:]) / (steps - 20) == pytest.approx(likeness, abs=0.12)  # it is at least 0
    assert errors["learned"] < 1.05 * min(errors["none"], errors["all"]) + 0.01 * errors["none"]
    if likeness == 0.5:
        assert errors["learned"] < 0.85 * min(errors["none"], errors["all"])


def test_with_the_whole_batch_it_is_the_shadows_own_gradient_to_the_bit() -> None:
    generator, control = torch.Generator().manual_seed(4), Control()
    for learn in (True, False, True):
        model, shadow = batch(0.5, generator)
        found = control.applied(Compared(mean(model), mean(shadow)), mean(model), learn=learn)
        assert all(torch.equal(found[name], value) for name, value in mean(shadow).items())
    assert float(control.coefficient) == 1.0


def test_its_sums_are_those_of_the_formula_and_only_of_parts_of_the_same_batch() -> None:
    generator, control = torch.Generator().manual_seed(5), Control()
    covariance = variance = 0.0
    for learn in (True, True, False):
        model, shadow = batch(0.7, generator)
        part, whole = Compared(mean(model, 8), mean(shadow, 8)), mean(model)
        found = control.applied(part, whole, learn=learn)
        if learn:
            error = {name: part.factual[name] - value for name, value in whole.items()}
            covariance = MEMORY * covariance + sum(float(part.shadow[n] @ e) for n, e in error.items())
            variance = MEMORY * variance + sum(float(e @ e) for e in error.values())
        assert float(control.coefficient) == pytest.approx(min(max(covariance / variance, 0), 1), rel=1e-12)
        for name, value in whole.items():
            error_there = part.factual[name] - value
            torch.testing.assert_close(found[name], part.shadow[name] - control.coefficient * error_there)


def test_weights_that_the_part_says_nothing_of_have_the_models_gradient() -> None:
    """Experts that no example of the part was routed to; and gradients at one of the two weights only."""
    one = torch.ones(2, dtype=torch.float64)
    whole = {"silent": 3 * one, "here only": 3 * one, "there only": 3 * one}
    found = Control().applied(Compared({"here only": 2 * one}, {"there only": one}), whole, learn=False)
    assert torch.equal(found["silent"], 3 * one)
    assert torch.equal(found["here only"], one)  # 0 - (2 - 3)
    assert torch.equal(found["there only"], 4 * one)  # 1 - (0 - 3)
