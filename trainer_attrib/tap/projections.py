"""The projections of a plan on a device, raw or with a second moment folded in."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from trainer_attrib.errors import ModelMismatchError
from trainer_attrib.numerics.projection import projection
from trainer_attrib.numerics.second_moment import inverse_root, root_mean
from trainer_attrib.numerics.sketching import add_bias, sketch_matrix
from trainer_attrib.tap.layers import Pair
from trainer_attrib.tap.names import parameters_by_name
from trainer_attrib.tap.plan import SketchPlan, WeightPlan
from trainer_attrib.tap.shards import Shard, shard_of

Factors = dict[str, tuple[Tensor, Tensor]]
"""Weight name -> row means [R] and column means [C] of its second moment."""


class Projections:
    """All projections of a plan.

    ``version`` names the second moment V folded in; 0 is none (raw gradients). A gradient is multiplied by ``unit /
    sqrt(V)``, where ``unit`` is the root of V's mean: entries are weighed against each other as the optimizer does, and
    the norm stays in the gradient's own units, so that it does not jump by orders of magnitude between versions.
    """

    def __init__(self, plan: SketchPlan, model: nn.Module, factors: Factors | None = None, version: int = 0) -> None:
        self.plan, self.version = plan, version
        parameters = parameters_by_name(model)
        for weight in plan.weights:
            _check_fits(weight, parameters[weight.name])
        self._like = {w.name: _reference(parameters[w.name]) for w in plan.weights}
        self.unit = root_mean((factors or {}).values())
        self._pairs = {w.name: self._pair(w, factors or {}) for w in plan.weights}

    def __getitem__(self, weight: str) -> Pair:
        return self._pairs[weight]

    def refreshed(self, weights: Iterable[WeightPlan], factors: Factors, version: int) -> Projections:
        """The same with a new second moment folded in for some weights: those of one optimizer."""
        changed = copy.copy(self)
        changed.version, changed.unit = version, root_mean(factors.values())
        changed._pairs = self._pairs | {w.name: changed._pair(w, factors) for w in weights}
        return changed

    @property
    def nbytes(self) -> int:
        """Memory held: at most 2K numbers per row and column of each weight, never rows times columns."""
        pairs = [[p.left, p.right, *p.sides, p.bias, *p.diagonals] for p in self._pairs.values()]
        held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for p in pairs for t in p if t is not None}
        return sum(held.values())

    def _pair(self, weight: WeightPlan, factors: Factors) -> Pair:
        shape = (weight.rows, weight.columns)
        left = projection(self.plan.seed, weight.name, shape, 0, self.plan.rank)
        right = projection(self.plan.seed, weight.name, shape, 1, self.plan.rank)
        if weight.name in factors:
            rows_R, columns_C = factors[weight.name]
            row_scale_R, column_scale_C = inverse_root(rows_R.double().cpu(), columns_C.double().cpu())
            left, right = left * (row_scale_R * self.unit), right * column_scale_C
        like, kept = self._like[weight.name], (weight.rows <= self.plan.rank, weight.columns <= self.plan.rank)
        return _pair_of(weight, left.to(like), right.to(like), kept)

    def rotated(self, plan: SketchPlan, turns: Mapping[str, tuple[Tensor, Tensor]]) -> Projections:
        """The same followed by one more matrix on each side of every weight, left [k_l, K_l] and right [k_r, K_r].

        Args:
            plan: the same weights, in sketches of k_l by k_r.
            turns: by weight name.
        """
        changed = copy.copy(self)
        changed.plan, pairs = plan, [(w, self._pairs[w.name], *turns[w.name]) for w in plan.weights]
        changed._pairs = {w.name: _pair_of(w, left @ p.left, right @ p.right) for w, p, left, right in pairs}
        return changed

    def scaled(self, scales: Mapping[str, tuple[Tensor, Tensor]]) -> Projections:
        """The same after gradients are multiplied by a b^T entry by entry.

        Args:
            scales: a [R] and b [C] by weight name.
        """
        changed = copy.copy(self)
        pairs = [(w, self._pairs[w.name], *scales[w.name]) for w in self.plan.weights]
        changed._pairs = {
            w.name: _pair_of(w, p.left * a.to(p.left), p.right * b.to(p.right), [d is not None for d in p.diagonals])
            for w, p, a, b in pairs
        }
        return changed

    def pulled_back(self, vectors_QK: Tensor) -> Tensor:
        """Vectors whose products with whole gradients, [Q, sum of R * C], are those of vectors with projected ones."""
        found = []
        for weight in self.plan.weights:
            pair, block_QKK = self._pairs[weight.name], vectors_QK[:, weight.span].unflatten(1, (weight.left, -1))
            found.append((pair.left.T @ block_QKK @ pair.right).flatten(1))
        return torch.cat(found, 1)

    def sketch(self, weight: WeightPlan, tensor: Tensor, bias: Tensor | None) -> Tensor:
        """Sketch of a tensor shaped like the weight (the weight itself, its gradient), [K_l, K_r].

        Of a sharded one this is the sketch of what this process holds: those of all processes add up to the whole.
        """
        pair, part = self._pairs[weight.name], shard_of(tensor)
        left, right = pair.sides
        if part.local.shape != tensor.shape:  # a vector is one row: its shards are columns
            if tensor.dim() == 1:
                right = right[:, part.span]
            else:
                left = of_shard(left, part, len(tensor))
        sketch = sketch_matrix(weight.matrix_of(part.local).to(pair.left.dtype), left, right)
        if bias is None or pair.bias is None:
            return sketch
        part = shard_of(bias)
        other = pair.sides[1 - weight.bias_axis]
        other = other if part.local.shape == bias.shape else other[:, part.span]
        return add_bias(sketch, part.local.to(other.dtype), weight.bias_axis, other, pair.bias)


def _pair_of(weight: WeightPlan, left: Tensor, right: Tensor, kept: Sequence[bool] = (False, False)) -> Pair:
    """Both projections of a weight; ``kept`` are those that are diagonal."""
    diagonals = _diagonal(left, kept[0]), _diagonal(right, kept[1])
    if not weight.bias:
        return Pair(left, right, (left, right), None, diagonals)
    extended = (left, right)[weight.bias_axis]
    main = extended[:, :-1].contiguous()
    sides = (main, right) if weight.bias_axis == 0 else (left, main)
    return Pair(left, right, sides, extended[:, -1].contiguous(), diagonals)


def _diagonal(side_KD: Tensor, kept: bool) -> Tensor | None:
    return side_KD.diagonal().contiguous() if kept else None


def of_shard(left_KR: Tensor, part: Shard, entries: int) -> Tensor:
    """The columns of a shard of a weight's first axis, of which an entry is a row or, in a stack, several."""
    return left_KR.unflatten(1, (entries, -1))[:, part.span].flatten(1)


def _check_fits(weight: WeightPlan, parameter: Tensor) -> None:
    """A plan may come from a ledger of another model, or from elsewhere: it says how much is allocated.

    Raises:
        ModelMismatchError: the weight has another size than the plan says.
    """
    rows = weight.rows - (bool(weight.bias) and weight.bias_axis == 0)
    columns = weight.columns - (bool(weight.bias) and weight.bias_axis == 1)
    if rows * columns != parameter.numel():
        raise ModelMismatchError(
            f"'{weight.name}' was recorded with {rows} x {columns} entries, the model's has {parameter.numel()}.",
            cause="the ledger was recorded from another model, or its plan was edited.",
            fix="pass the model that was recorded.",
        )


def _reference(parameter: Tensor) -> Tensor:
    """An empty tensor with the device and dtype that this weight's sketches are computed in."""
    dtype = torch.float64 if parameter.dtype == torch.float64 else torch.float32
    return torch.empty(0, dtype=dtype, device=parameter.device)
