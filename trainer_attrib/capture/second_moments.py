"""When the second moments are folded into the projections, and their factors for every sketched weight."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from trainer_attrib.capture.moment_readers import Factored, correction_unavailable, second_moment
from trainer_attrib.capture.processes import Processes, is_sharded
from trainer_attrib.numerics.second_moment import append_bias, factor, lifted
from trainer_attrib.tap.plan import WeightPlan
from trainer_attrib.tap.projections import Factors
from trainer_attrib.tap.shards import shard_of
from trainer_attrib.types import Correction

FIRST, GROWTH = 4, 3
"""Refreshed after steps 4, 12, 36, 108, ...: few versions, each at most 3x as old as when it was new."""


class SecondMoments:
    """The factored second moments of one optimizer; ``unavailable`` says why there are none, if there are none.

    Args:
        weights: those that the optimizer updates.
        optimizer: whose state is read.
        parameters: all of the model's, by canonical name.
        correction: what is wanted, see :class:`Correction`.
        processes: each holds a part of the state where parameters are sharded.
    """

    def __init__(
        self,
        weights: Sequence[WeightPlan],
        optimizer: Optimizer,
        parameters: dict[str, nn.Parameter],
        correction: str,
        processes: Processes,
    ) -> None:
        self._weights, self._optimizer, self._parameters, self._processes = weights, optimizer, parameters, processes
        self._sharded = any(is_sharded(parameters[weight.name]) for weight in weights)
        wanted = correction == Correction.FACTORED
        self.unavailable = correction_unavailable(optimizer) if wanted else ""
        self._next = FIRST if wanted and not self.unavailable else None

    def due(self, step: int) -> bool:
        """Whether a new version is to be made after this step."""
        return self._next is not None and step >= self._next

    def catch_up(self, step: int) -> None:
        """Plan the next version after this step, as if all before it had been made."""
        while self._next is not None and self._next <= step:
            self._next *= GROWTH

    def factors(self, steps: int, *, present: bool = True) -> Factors:
        """Row and column means of the second moments, for the weights that were updated already; {} for none yet.

        Rows that got hardly any gradient yet, such as an unseen token's, are lifted to 1/steps of the mean: what they
        will have once they get a typical one, which is the first that matters. Without it their amplification would
        be a hundredfold where the optimizer's own is at most sqrt(steps).

        A state that is not what its optimizer's reader expects ends the correction: ``unavailable`` says why.

        Args:
            steps: that the optimizer has taken.
            present: False where capture failed in this process and only its turn is taken.

        Raises:
            CaptureError: sharded, and capture failed in one of the processes.
        """
        try:
            known = self._of_all_shards(present) if self._sharded else self._found()
        except KeyError as missing:
            name = type(self._optimizer).__name__
            self.unavailable = f"{name}'s state has no {missing}; rows are raw gradients from here on"
            self._next = None
            return {}
        if known and self._next is not None:
            self._next *= GROWTH
        return {name: lifted(*means, floor=1 / max(1, steps)) for name, means in known.items()}

    def _found(self) -> Factors:
        found = {weight.name: self._factors(weight) for weight in self._weights}
        return {name: factors for name, factors in found.items() if factors is not None}

    def _factors(self, weight: WeightPlan) -> tuple[Tensor, Tensor] | None:
        """A weight's row and column means with its bias's appended, as the sketch sees them."""
        moment = second_moment(self._optimizer, self._parameters[weight.name])
        if moment is None:
            return None
        means = (moment.rows, moment.columns) if isinstance(moment, Factored) else factor(weight.matrix_of(moment))
        if not weight.bias:
            return means
        bias = second_moment(self._optimizer, self._parameters[weight.bias])
        assert not isinstance(bias, Factored)  # a vector
        return None if bias is None else append_bias(*means, bias, weight.bias_axis)

    def _of_all_shards(self, present: bool) -> Factors:
        """The same from what every process holds. One exchange: row sums, column sums and biases of all weights."""
        if any(isinstance(second_moment(self._optimizer, self._parameters[w.name]), Factored) for w in self._weights):
            raise KeyError("second moments in one piece, as sharded parameters need")  # in every process alike
        shapes = [_exchanged(self._parameters, weight) for weight in self._weights]
        like = shard_of(self._parameters[self._weights[0].name].data).local.double()
        make = (
            None if not present else lambda: torch.cat([part for w in self._weights for part in self._parts(w, like)])
        )
        total = self._processes.total(make, like, sum(map(sum, shapes)))
        known: Factors = {}
        for weight, shape, flat in zip(self._weights, shapes, total.split([sum(s) for s in shapes]), strict=True):
            rows, columns, bias = flat.split(list(shape))
            means = rows / shape[1], columns / shape[0]
            known[weight.name] = append_bias(*means, bias, weight.bias_axis) if weight.bias else means
        return known if bool(total.any()) else {}

    def _parts(self, weight: WeightPlan, like: Tensor) -> list[Tensor]:
        """Row sums, column sums and the bias of this process's shards, zero elsewhere."""
        parameter = self._parameters[weight.name]
        rows, columns, bias = _exchanged(self._parameters, weight)
        parts = [like.new_zeros(rows), like.new_zeros(columns), like.new_zeros(bias)]
        moment = second_moment(self._optimizer, parameter)
        if moment is None or not (self._processes.leads or is_sharded(parameter)):  # one tells of what all of them hold
            return parts
        shard = shard_of(cast(Tensor, moment))
        matrix = weight.matrix_of(shard.local).double()
        by_row, by_column = matrix.sum(1), matrix.sum(0)
        across, along = (parts[1], parts[0]) if parameter.dim() == 1 else (parts[0], parts[1])
        sharded, shared = (by_column, by_row) if parameter.dim() == 1 else (by_row, by_column)
        entries = across.view(len(parameter), -1)[shard.span]
        entries.copy_(sharded.view_as(entries))
        along += shared
        if weight.bias:
            moment = second_moment(self._optimizer, self._parameters[weight.bias])
            if isinstance(moment, Tensor):
                shard = shard_of(moment)
                parts[2][shard.span] = shard.local.double()
        return parts


def _exchanged(parameters: dict[str, nn.Parameter], weight: WeightPlan) -> tuple[int, int, int]:
    """Rows and columns of a weight without its bias, and the bias's length."""
    extended = (weight.rows, weight.columns)
    rows, columns = (size - (bool(weight.bias) and axis == weight.bias_axis) for axis, size in enumerate(extended))
    return rows, columns, parameters[weight.bias].numel() if weight.bias else 0
