"""How a later stage carries a displacement of the weights that it began with, and a gradient back.

A stage is cut into pieces of consecutive steps. In each, curvature A (Gauss-Newton, of one thinned batch of the piece)
and the optimizer's metric P count as constant, P holding the sum of the learning rates. Where training pulls displaced
weights by r(delta) = g(weights + delta) - g(weights) more than the recorded ones, g being the gradient after clipping,
Adam moves them by (``numerics.update_rules.adam_drift``)

    delta <- delta - (sum of learning rates) ((u + r / sqrt(v)) / sqrt(1 + 2 u r / sqrt(v) + r^2 / v) - u),

u and v being its recorded mean movement and second moment: by no more than twice the learning rates, however large r
is. SGD has no such bound, and there

    delta <- delta - P^(1/2) phi(P^(1/2) A P^(1/2)) P^(1/2) r(delta),    phi(a) = (1 - exp(-a)) / a,

which is the exponential Euler method (Hochbruck and Ostermann 2010, "Exponential integrators", section 2.1): the stiff
part is integrated exactly, and what the loss is not quadratic in enters through r. Weight decay is applied in halves
before and after. Weights that the stage does not train keep their displacement and drive the others through r.

With r(delta) = A delta the map is linear: delta <- P^(1/2) exp(-P^(1/2) A P^(1/2)) P^(-1/2) delta for trained weights
(Bae et al. 2024, "Training data attribution via approximate unrolled differentiation", section 3). Its adjoint carries
gradients back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from trainer_attrib.analysis.curvature import CHANGE, DIFFERENCE, PRODUCT, SETUP, Curvature
from trainer_attrib.analysis.displacement import Displacement
from trainer_attrib.analysis.effects.between_snapshots import BetweenSnapshots
from trainer_attrib.analysis.effects.lineage import Lineage
from trainer_attrib.analysis.programs import Step, Steps, steps_of
from trainer_attrib.analysis.replaying import cannot_step, prepare
from trainer_attrib.analysis.training_state import TrainingState, copy_model, put, random_states_kept, standing
from trainer_attrib.errors import NotComparableError
from trainer_attrib.ledger.reader import StageReader
from trainer_attrib.numerics.krylov import Spectral, apply_function, decay, response
from trainer_attrib.numerics.update_rules import adam_drift
from trainer_attrib.tap.names import parameters_by_name


@dataclass(frozen=True)
class Effort:
    """What is spent on a later stage.

    Args:
        products: of curvature with a vector, in every piece.
        batches: whole batches' worth of examples in all pieces together; twice as many for Adam, whose pull takes no
            curvature.
        thin: a piece has one in so many of a batch's examples: there are about ``batches * thin`` pieces.
    """

    products: int
    batches: float
    thin: int

    def worth(self, stage: StageReader) -> float:
        """Whole batches' worth of examples used of a stage, at least one."""
        return max(self.batches * (2 if BetweenSnapshots(stage).adaptive else 1), 1.0)

    def price(self, stage: StageReader, driven: bool) -> float:
        """At most what carrying one vector through a stage costs, in gradients of a whole batch."""
        most = min(self.worth(stage), stage.count("steps"))
        if BetweenSnapshots(stage).adaptive:
            return most * CHANGE
        products = 2 * self.products + 1 if driven else self.products
        return most * (SETUP + PRODUCT + CHANGE + DIFFERENCE * products)  # should the first one fail


@dataclass(frozen=True)
class Piece:
    """Steps ``first`` up to ``last`` of a stage (counted from 0), and a batch of one of them."""

    first: int
    last: int
    step: Step


class Passage:
    """A later stage as a map of displacements, and the adjoint of its linear part, on a copy of the model.

    Momentum that a stage brought along is part of the state that the map leaves out: what was left of the earlier
    stage's momentum counts as not displaced.

    Raises:
        MissingProgramError: the stage's program does not say how it runs step by step.
        NotComparableError: the program gave no batch.
    """

    def __init__(self, lineage: Lineage, stage: StageReader, effort: Effort) -> None:
        self._stage, self._effort, self._record = stage, effort, BetweenSnapshots(stage)
        self.cost = 0.0
        with random_states_kept():
            self._model = copy_model(lineage.model)
            put(self._model, lineage.start(stage))
            prepared = prepare(self._model, stage, lineage.programs)
            steps = steps_of(prepared, self._model)
            if steps is None:
                raise cannot_step(stage, prepared)
            self._pieces, self._clip = _pieces(stage, steps, effort), steps.clip
        self._parameters = parameters_by_name(self._model)

    def forward(self, displacement: Displacement) -> Displacement:
        """A displacement at the stage's start -> at its end."""
        for piece in self._pieces:
            with self._flow(piece, displacement) as flow:
                displacement = flow.forward(displacement)
        return displacement

    def backward(self, gradient: Displacement) -> Displacement:
        """A gradient with respect to the weights at the stage's end -> at its start."""
        for piece in reversed(self._pieces):
            with self._flow(piece, gradient) as flow:
                gradient = flow.backward(gradient)
        return gradient

    @contextmanager
    def _flow(self, piece: Piece, vector: Displacement) -> Iterator[_Flow]:
        trained = self._record.trained
        names = [*trained, *sorted(vector.keys() & self._parameters.keys() - set(trained))]
        parameters = {name: self._parameters[name] for name in names}
        weights = self._record.weights((piece.first + piece.last) / 2)
        with standing(self._model, TrainingState(weights)):
            curvature = Curvature(self._model, piece.step.losses, list(parameters.values()), piece.first)
            yield _Flow(curvature, parameters, self._record, piece, self._effort.products, self._clip)
        self.cost += piece.step.share * curvature.cost


class _Flow:
    """One piece. Vectors are flat, [P], on the model's device: first what the stage trained, then what it froze."""

    def __init__(
        self,
        curvature: Curvature,
        parameters: Mapping[str, Tensor],
        record: BetweenSnapshots,
        piece: Piece,
        products: int,
        clip: Callable[[], None],
    ) -> None:
        self._curvature, self._parameters, self._products, self._clip = curvature, parameters, products, clip
        span = piece.first, piece.last
        metric, kept, added = record.metric(*span), record.decay(*span), record.curvature_of_decay(*span)
        self._root_P = self._flat(metric, 0.0).sqrt()
        self._kept_P, self._added_P = self._flat(kept, 1.0).sqrt(), self._flat(added, 0.0)
        self._adam_P: tuple[Tensor, Tensor, Tensor] | None = None
        if record.adaptive:
            middle = (piece.first + piece.last) / 2
            of_adam = record.rates(*span), record.speeds(middle), record.directions(middle)
            rate_P, speed_P, direction_P = (self._flat(named, 0.0) for named in of_adam)
            self._adam_P = rate_P, speed_P, direction_P
        self._frozen_P = self._flat(dict.fromkeys(record.trained, torch.zeros(())), 1.0)

    def forward(self, displacement: Displacement) -> Displacement:
        delta_P = self._kept_P * self._flat(displacement, 0.0)
        change_P = self._along(lambda vector: self._curvature.change(vector, self._clip), delta_P)
        result_P = delta_P - self._pull(change_P + self._added_P * delta_P)
        return self._named(self._kept_P * result_P, displacement)

    def _pull(self, change_P: Tensor) -> Tensor:
        """How far a change of the gradient moves the weights, with the sign of the change."""
        if self._adam_P is None:
            return self._root_P * self._apply(self._root_P * change_P, response(1.0))
        rate_P, speed_P, direction_P = self._adam_P
        return rate_P * adam_drift(change_P, speed_P, direction_P)

    def backward(self, gradient: Displacement) -> Displacement:
        slope_P = self._kept_P * self._flat(gradient, 0.0)
        scaled_P = self._root_P * slope_P
        result_P = slope_P + _over(self._decayed(scaled_P), self._root_P)
        if self._frozen_P.any():
            response_P = self._root_P * self._apply(scaled_P, response(1.0))
            result_P = result_P - self._frozen_P * self._product(response_P)
        return self._named(self._kept_P * result_P, gradient)

    def _decayed(self, vector_P: Tensor) -> Tensor:
        """What decay takes away from a vector, negative."""
        return self._apply(vector_P, decay(1.0)) - vector_P

    def _apply(self, vector_P: Tensor, function: Spectral) -> Tensor:
        def product(v_P: Tensor) -> Tensor:
            scaled_P = self._root_P * v_P
            return self._root_P * (self._product(scaled_P) + self._added_P * scaled_P)

        return apply_function(product, vector_P, function, self._products)

    def _product(self, vector_P: Tensor) -> Tensor:
        return self._along(self._curvature.product, vector_P)

    def _along(self, of: Callable[[list[Tensor]], list[Tensor]], vector_P: Tensor) -> Tensor:
        places = list(self._parameters.values())
        parts = vector_P.split([p.numel() for p in places])
        found = of([v.view_as(p).to(p.dtype) for v, p in zip(parts, places, strict=True)])
        return torch.cat([f.reshape(-1).to(vector_P) for f in found])

    def _flat(self, named: Mapping[str, Tensor], default: float) -> Tensor:
        """Values of all parameters; numbers are spread over a parameter."""
        places = self._parameters
        double = any(p.dtype == torch.float64 for p in places.values())
        like = {"dtype": torch.float64 if double else torch.float32, "device": next(iter(places.values())).device}
        other = torch.tensor(default)
        return torch.cat([named.get(n, other).to(**like).expand(p.shape).reshape(-1) for n, p in places.items()])

    def _named(self, vector_P: Tensor, others: Displacement) -> Displacement:
        parts = vector_P.split([p.numel() for p in self._parameters.values()])
        found = {n: v.view_as(p) for (n, p), v in zip(self._parameters.items(), parts, strict=True)}
        return {**others, **{name: value.double().cpu() for name, value in found.items()}}


def _over(numerator_P: Tensor, denominator_P: Tensor) -> Tensor:
    """The quotient; 0 where the denominator is."""
    return torch.where(denominator_P > 0, numerator_P / denominator_P, 0.0)


def _pieces(stage: StageReader, steps: Steps, effort: Effort) -> list[Piece]:
    """Pieces of equal length with the batch in the middle of each, as many as the effort allows."""
    total, found, limit, spent = stage.count("steps"), list[Step](), effort.worth(stage) + 1e-9, 0.0
    wanted: set[int] = set()
    for number, step in zip(range(total), steps.steps(effort.thin), strict=False):
        if number == 0:
            count = min(max(int(limit / step.share), 1), total)
            wanted = {int((i + 0.5) * total / count) for i in range(count)}
        if number in wanted and spent + step.share <= limit:
            found.append(step)
            spent += step.share
    if not found:
        raise NotComparableError(
            f"The program of stage '{stage.name}' gave no batch.",
            cause="its data are empty, or an iterator that was read before.",
            fix="build the program with the same data and arguments as the recorded stage.",
        )
    bounds = [round(i * total / len(found)) for i in range(len(found) + 1)]
    return [Piece(a, b, step) for a, b, step in zip(bounds, bounds[1:], found, strict=False)]
