"""One pass over a run's batches at the model's present weights: what its optimizer would make of frozen gradients."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from trainer_attrib.analysis.displacement import Displacement
from trainer_attrib.analysis.forecasting.arms import Arm, adam_epsilon
from trainer_attrib.analysis.forecasting.run import Run
from trainer_attrib.analysis.programs import Step
from trainer_attrib.errors import ConfigurationError
from trainer_attrib.progress import progress
from trainer_attrib.tap.names import parameters_by_name

KEPT, ENOUGH, CLIPPED = 4, 32, 1 - 1e-4
"""Batches that are remembered to see how their loss would fall: so many, or fewer that have so many examples."""


@dataclass(frozen=True)
class Shrinking:
    """By what clipping to a norm shrinks gradients.

    Args:
        bound: of the norm; infinite where nothing was clipped.
        typical: median of the squared norms of steps' gradients before clipping.
    """

    bound: float
    typical: float

    def of_examples(self, squares_N: Tensor, batch_size: int) -> Tensor:
        """Factors [N] by which the gradients of steps that hold each example are expected to shrink: with B examples in
        a step, its squared norm is |g|^2 / B^2 of the example itself and (1 - 1 / B) of what is typical.

        Args:
            squares_N: squared norms of the examples' own gradients, float64.
            batch_size: B.
        """
        expected_N = squares_N / batch_size**2 + (1 - 1 / batch_size) * self.typical
        return (self.bound / expected_N.clamp(min=1e-300).sqrt()).clamp(max=1.0)


@dataclass(frozen=True)
class GradientPass:
    """What the pass gave.

    Args:
        moved: where frozen gradients lead the optimizer.
        mean: of the gradients over batches, after clipping.
        apart: half the difference between the mean over every other batch and that over the remaining ones: what the
            batches do not agree on, of the size of the error of their mean.
        square: mean of their squares.
        epsilon: of an optimizer of Adam's kind, else None.
        rates: sum over steps of the learning rate of each weight's group.
        clipping: what clipping did to the gradients of steps.
        share: of the run's batches that were differentiated.
        sample: a few of them.
        sample_loss: the sum of their losses.
        sample_slope: its gradient, before clipping.
    """

    moved: Displacement
    mean: Displacement
    apart: Displacement
    square: Displacement
    epsilon: float | None
    rates: Mapping[str, float]
    clipping: Shrinking
    share: float
    sample: tuple[Step, ...] = field(repr=False)
    sample_loss: float
    sample_slope: Displacement

    @property
    def metric(self) -> Displacement:
        """How far the run moves each weight per unit of the mean gradient, positive: the sum of the learning rates,
        over sqrt(mean of the squares) + epsilon for an optimizer of Adam's kind.

        Second moments are those of batches, signal and noise: that of the mean gradient alone would move noisy weights
        too far. Zero where no batch has a gradient.
        """
        if self.epsilon is None:
            return {name: torch.full_like(g, self.rates[name]) for name, g in self.mean.items()}
        metric = {name: self.rates[name] / (self.square[name].sqrt() + self.epsilon) for name in self.mean}
        return {name: value.masked_fill_(self.square[name] == 0, 0.0) for name, value in metric.items()}

    @property
    def warm(self) -> Displacement:
        """The jump of an optimizer whose moments are warm from the beginning: minus metric times mean gradient."""
        return self._jump(self.mean)

    @property
    def noise(self) -> Displacement:
        """The same jump along what the batches do not agree on."""
        return self._jump(self.apart)

    def _jump(self, gradients: Displacement) -> Displacement:
        metric = self.metric
        return {name: -metric[name] * gradient for name, gradient in gradients.items()}


def gradient_pass(run: Run, share: float = 1.0) -> GradientPass:
    """Differentiate a share of the run's batches, evenly spaced over it, each standing for those up to the next.

    The model's weights stay where they are; its gradients and random states are the caller's to restore.

    Raises:
        ConfigurationError: a share outside (0, 1], a run without a batch, or a gradient that is not finite.
    """
    if not 0 < share <= 1:
        raise ConfigurationError(f"share={share}", fix="pass the part of the batches to differentiate, in (0, 1].")
    places = parameters_by_name(run.steps.model)
    names = {id(place): name for name, place in places.items()}
    arm = Arm(run.steps.optimizer(), names)
    sums, sampled, squares, bound = _Sums(), _Sums(), list[float](), float("inf")
    windows = list(_windows(len(run.rates), max(1, round(1 / share))))
    kept = min(KEPT, -(-ENOUGH // run.batch_size))
    sample, every = [], max(1, len(windows) // kept)
    for number, (window, step) in enumerate(progress(_batches(run, windows), "gradients", len(windows))):
        gradients, loss, norm, factor = _gradients(run, step, places)
        sums.add(gradients, loss)
        squares.append(norm**2)
        bound = factor * norm if factor < CLIPPED else bound
        arm.step(gradients, [run.rates[i] for i in window])
        if number % every == 0 and len(sample) < kept:
            sample.append(step)
            sampled.add({name: gradient / factor for name, gradient in gradients.items()}, loss)
        del gradients  # before the next ones are computed
    optimizer = run.steps.optimizer()
    return GradientPass(
        moved=arm.end(),
        mean=sums.mean(),
        apart=sums.apart(),
        square=sums.square(),
        epsilon=adam_epsilon(optimizer),
        rates=_sum_of_rates(run, optimizer, names),
        clipping=Shrinking(bound, statistics.median(squares)),
        share=len(windows) / len(run.rates),
        sample=tuple(sample),
        sample_loss=sampled.loss,
        sample_slope={name: gradient * sampled.count for name, gradient in sampled.mean().items()},
    )


def _windows(steps: int, every: int) -> Iterator[range]:
    for first in range(0, steps, every):
        yield range(first, min(first + every, steps))


def _batches(run: Run, windows: list[range]) -> Iterator[tuple[range, Step]]:
    batches = run.steps.steps()
    for window in windows:
        step = next(batches, None)
        if step is None:
            raise ConfigurationError(
                f"The run gave no batch for its step {window.start + 1} of {windows[-1].stop}.",
                cause="its data end before its last step, or it has none.",
                fix="look at the data set, max_steps and the number of epochs.",
            )
        yield window, step
        for _ in itertools.islice(batches, len(window) - 1):
            pass


def _gradients(run: Run, step: Step, places: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], float, float, float]:
    """Of one step's batch as the optimizer would see it, its loss, the norm before clipping, and by what clipping
    multiplied it."""
    model = run.steps.model
    model.zero_grad(set_to_none=True)
    total = 0.0
    for compute in step.losses:
        loss = compute()
        loss.backward()
        total += float(loss.detach())
    before = _norm(places)
    if not before < float("inf"):
        raise ConfigurationError(
            "A gradient of the run is not finite at its first weights.",
            cause="a batch without a label that counts, or weights or data that overflow.",
            fix="train a step and look at its loss.",
        )
    run.steps.clip()
    factor = _norm(places) / before if before else 1.0
    found = {name: place.grad for name, place in places.items() if place.grad is not None}
    model.zero_grad(set_to_none=True)  # they are ours now, none is written to again
    return found, total, before, factor


def _norm(places: Mapping[str, Tensor]) -> float:
    return float(nn.utils.get_total_norm([place.grad for place in places.values() if place.grad is not None]))


def _sum_of_rates(run: Run, optimizer: torch.optim.Optimizer, names: Mapping[int, str]) -> dict[str, float]:
    found = {}
    for number, group in enumerate(optimizer.param_groups):
        grown = 1 - group["momentum"] if group.get("momentum") else 1.0
        total = sum(rate[number] for rate in run.rates) / grown
        found |= {names[id(parameter)]: total for parameter in group["params"]}
    return found


class _Sums:
    """Running sums of gradients, of every other one and of the remaining ones, and of their squares; float32 where the
    gradients are."""

    def __init__(self) -> None:
        self.count, self.loss = 0, 0.0
        self._halves: tuple[dict[str, Tensor], dict[str, Tensor]] = ({}, {})
        self._squares: dict[str, Tensor] = {}

    def add(self, gradients: Mapping[str, Tensor], loss: float) -> None:
        half = self._halves[self.count % 2]
        self.count, self.loss = self.count + 1, self.loss + loss
        for name, gradient in gradients.items():
            if name not in self._squares:
                self._squares[name] = torch.zeros_like(gradient)
            self._squares[name].addcmul_(gradient, gradient)
            half[name] = half[name].add_(gradient) if name in half else gradient.clone()

    def mean(self) -> Displacement:
        pairs = ((name, self._of(name)) for name in self._squares)
        return {name: (even + odd) / self.count for name, (even, odd) in pairs}

    def apart(self) -> Displacement:
        """Half the difference of the two halves' means; nothing of one batch alone."""
        if self.count < 2:
            return {}
        counts = (self.count + 1) // 2, self.count // 2
        pairs = ((name, self._of(name)) for name in self._squares)
        return {name: (even / counts[0] - odd / counts[1]) / 2 for name, (even, odd) in pairs}

    def square(self) -> Displacement:
        return {name: total.cpu() / self.count for name, total in self._squares.items()}

    def _of(self, name: str) -> tuple[Tensor, Tensor]:
        even, odd = (half.get(name) for half in self._halves)
        zero = torch.zeros_like(self._squares[name])
        return (zero if even is None else even).cpu(), (zero if odd is None else odd).cpu()
