"""How a later stage carries a displacement of the weights that it began with, and a gradient back.

Forward, the stage's optimizer runs twice on a few batches (``side_by_side.py``). Back, a gradient goes through the
adjoint of a linear map: in each piece of the stage, curvature A (Gauss-Newton, of the piece's batch) and the
optimizer's metric P count as constant, P holding the sum of the learning rates, over the root of the second moment for
Adam, and

    delta <- P^(1/2) exp(-P^(1/2) A P^(1/2)) P^(-1/2) delta

for trained weights (Bae et al. 2024, "Training data attribution via approximate unrolled differentiation", section 3).
Weight decay is applied in halves before and after. Weights that the stage does not train keep their displacement and
drive the others.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from trainer_attrib.analysis.curvature import Curvature
from trainer_attrib.analysis.displacement import Displacement
from trainer_attrib.analysis.effects.between_snapshots import BetweenSnapshots
from trainer_attrib.analysis.effects.lineage import Lineage
from trainer_attrib.analysis.effects.pieces import Effort, Piece, pieces_of
from trainer_attrib.analysis.effects.side_by_side import Closure, Displaced, SideBySide
from trainer_attrib.analysis.programs import steps_of
from trainer_attrib.analysis.replaying import cannot_step, prepare
from trainer_attrib.analysis.training_state import TrainingState, copy_model, put, random_states_kept, standing
from trainer_attrib.ledger.reader import StageReader
from trainer_attrib.numerics.krylov import Spectral, apply_function, decay, response
from trainer_attrib.tap.names import parameters_by_name


class Passage:
    """A later stage as a map of displacements, and the adjoint of its linear form, on a copy of the model.

    ``cost`` says what it has cost so far, in gradients of a batch; ``closure`` how near to the recorded weights the
    optimizer came that went forward from them.

    Raises:
        MissingProgramError: the stage's program does not say how it runs step by step.
        NotComparableError: the program gave no batch.
    """

    def __init__(self, lineage: Lineage, stage: StageReader, effort: Effort) -> None:
        self._stage, self._effort, self._record = stage, effort, BetweenSnapshots(stage)
        self._start = lineage.start(stage)
        self.cost, self.closure = 0.0, Closure(0.0, 0.0)
        with random_states_kept():
            self._model = copy_model(lineage.model)
            put(self._model, self._start)
            prepared = prepare(self._model, stage, lineage.programs)
            steps = steps_of(prepared, self._model)
            if steps is None:
                raise cannot_step(stage, prepared)
            self._pieces, self._steps = pieces_of(stage, steps, effort), steps
        self._parameters = parameters_by_name(self._model)

    def forward(self, displaced: Displaced) -> Displaced:
        """What is displaced at the stage's start -> at its end."""
        if not self._pieces:
            return displaced
        both = SideBySide(self._model, self._stage, self._steps, self._start.optimizer, displaced)
        for piece in self._pieces:
            both.take(piece, self._record.weights(piece.middle))
        self.cost += both.cost
        self.closure = both.closure(self._record.weights(self._stage.count("steps")))
        return both.displaced

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
        with standing(self._model, TrainingState(self._record.weights(piece.middle))):
            curvature = Curvature(self._model, piece.step.losses, list(parameters.values()), piece.first)
            yield _Flow(curvature, parameters, self._record, piece, self._effort.products)
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
    ) -> None:
        self._curvature, self._parameters, self._products = curvature, parameters, products
        span = piece.first, piece.last
        metric, kept, added = record.metric(*span), record.decay(*span), record.curvature_of_decay(*span)
        self._root_P = self._flat(metric, 0.0).sqrt()
        self._kept_P, self._added_P = self._flat(kept, 1.0).sqrt(), self._flat(added, 0.0)
        self._frozen_P = self._flat(dict.fromkeys(record.trained, torch.zeros(())), 1.0)

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
        places = list(self._parameters.values())
        parts = vector_P.split([p.numel() for p in places])
        found = self._curvature.product([v.view_as(p).to(p.dtype) for v, p in zip(parts, places, strict=True)])
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
