"""Which weights are sketched, through which modules, into which columns of a row: fixed before the first step."""

from __future__ import annotations

import fnmatch
import itertools
from collections.abc import Container, Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import Tensor, nn

from trainer_attrib.errors import LedgerFormatError, UnsupportedLayerError
from trainer_attrib.numerics.sketching import as_matrix
from trainer_attrib.tap.experts import stack_name, stacks_of, why_not_watched
from trainer_attrib.tap.layers import known_layers, rule_for
from trainer_attrib.tap.names import modules_by_name, parameters_by_name, walk
from trainer_attrib.types import SketchConfig

_NOBODY = "no optimizer updates it"
_NO_STACK = "its module's experts are captured, but it is none of their stacks"
_OTHERS = "another optimizer updates it than its layer's weight"


@dataclass(frozen=True)
class WeightPlan:
    """One sketched weight: a parameter, its bias if that is captured with it, and the modules that use it (a stack of
    experts uses itself: its module has several).

    ``rows`` and ``columns`` count the bias (appended along ``bias_axis``); the sketch has ``left * right`` numbers and
    starts at column ``offset`` of a row.
    """

    name: str
    bias: str
    bias_axis: int
    modules: tuple[str, ...]
    rows: int
    columns: int
    left: int
    right: int
    offset: int

    @property
    def size(self) -> int:
        """Numbers of a row that this weight takes."""
        return self.left * self.right

    def matrix_of(self, tensor: Tensor) -> Tensor:
        """A tensor shaped like the weight, or a shard of one, as a matrix without the bias."""
        columns = self.columns - (bool(self.bias) and self.bias_axis == 1)
        return tensor.unsqueeze(0) if tensor.dim() == 1 else tensor.reshape(-1, columns)

    @property
    def span(self) -> slice:
        """Columns of a row that belong to this weight."""
        return slice(self.offset, self.offset + self.size)


@dataclass(frozen=True)
class SketchPlan:
    """The weights of a sketch, in order, and why every other trainable parameter is not part of it.

    A stored row is the sketch itself or, with ``blocks``, the pooled one: sketches of weights in a block added up.
    """

    weights: tuple[WeightPlan, ...]
    uncovered: dict[str, str]
    rank: int
    seed: int
    blocks: int | None = None

    @property
    def width(self) -> int:
        """Numbers per sketch."""
        return sum(weight.size for weight in self.weights)

    @property
    def row_width(self) -> int:
        """Numbers per stored row."""
        return sum(span.stop - span.start for span in self.row_spans)

    @property
    def row_spans(self) -> list[slice]:
        """Columns of a stored row that belong together: a weight's, or those of a block."""
        return sorted({(s.start, s.stop): s for s in self._places.values()}.values(), key=lambda span: span.start)

    @property
    def row_blocks(self) -> list[list[int]]:
        """Of which matrices a stored row is made, ``[count, left, right]`` of neighbors that are alike."""
        shapes = {self._places[weight.name].start: (weight.left, weight.right) for weight in self.weights}
        runs = itertools.groupby(shapes[span.start] for span in self.row_spans)
        return [[len(list(alike)), *shape] for shape, alike in runs]

    @property
    def _places(self) -> dict[str, slice]:
        """Columns of a stored row that each weight is in."""
        if self.blocks is None:
            return {weight.name: weight.span for weight in self.weights}
        alike: dict[tuple[int, int], list[WeightPlan]] = {}
        for weight in self.weights:
            alike.setdefault((weight.left, weight.right), []).append(weight)
        places, first = {}, 0
        for same in alike.values():
            count = min(self.blocks, len(same))
            for number, weight in enumerate(same):
                begin = first + number * count // len(same) * weight.size
                places[weight.name] = slice(begin, begin + weight.size)
            first += count * same[0].size
        return places

    def pool(self, sketches_NK: Tensor) -> Tensor:
        """Stored rows of sketches, [N, row_width]."""
        if self.blocks is None:
            return sketches_NK
        rows_NR, places = sketches_NK.new_zeros(len(sketches_NK), self.row_width), self._places
        for weight in self.weights:
            rows_NR[:, places[weight.name]] += sketches_NK[:, weight.span]
        return rows_NR

    def of_weights(self, names: Container[str]) -> SketchPlan:
        """The plan of some of the weights, whose columns follow each other anew."""
        chosen, offset = [], 0
        for weight in self.weights:
            if weight.name in names:
                chosen.append(replace(weight, offset=offset))
                offset += weight.size
        return replace(self, weights=tuple(chosen))

    def of_rank(self, rank: int) -> SketchPlan:
        """The same weights in sketches of another dimension."""
        chosen, offset = [], 0
        for weight in self.weights:
            sides = {"left": min(rank, weight.rows), "right": min(rank, weight.columns)}
            chosen.append(replace(weight, **sides, offset=offset))
            offset += chosen[-1].size
        return replace(self, weights=tuple(chosen), rank=rank)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {name: value for name, value in asdict(self).items() if name != "blocks" or value is not None}

    @staticmethod
    def from_dict(data: dict[str, Any]) -> SketchPlan:
        """Inverse of :meth:`to_dict`.

        Raises:
            LedgerFormatError: no plan looks like this.
        """
        with suppress(KeyError, TypeError, ValueError):
            weights = tuple(WeightPlan(**{**w, "modules": tuple(w["modules"])}) for w in data["weights"])
            rank, seed, blocks = int(data["rank"]), int(data["seed"]), data.get("blocks")
            plan = SketchPlan(weights, dict(data["uncovered"]), rank, seed, blocks)
            if plan.of_rank(rank) == plan:
                return plan
        raise LedgerFormatError(
            "The plan of the sketches is none that this library makes: its spans or sizes do not fit each other.",
            cause="stage.json was edited or damaged.",
            fix="restore the file from a backup.",
        )


def plan_sketch(model: nn.Module, config: SketchConfig, owners: Mapping[int, int] | None = None) -> SketchPlan:
    """Choose the weights to sketch.

    Args:
        model: the model being trained.
        config: which of its layers are wanted, and the sketch's rank and seed.
        owners: the ``id`` of each parameter that is updated -> number of its optimizer; by default all are, by one.

    Raises:
        UnsupportedLayerError: no trainable module of a known type matches ``config.modules``.
    """
    names = {id(parameter): name for name, parameter in parameters_by_name(model).items()}
    trainable = {name: p for name, p in parameters_by_name(model).items() if p.requires_grad}
    owner = {name: 0 if owners is None else owners.get(id(p)) for name, p in trainable.items()}
    uses, reasons = _uses_of_weights(model, config, names, owner)
    modules = modules_by_name(model)
    weights, offset = [], 0
    for name in uses:
        module = modules.get(uses[name][0])
        weights.append(_weight_plan(module, trainable[name], name, uses[name], names, owner, config.rank, offset))
        offset += weights[-1].size
    if not weights:
        raise _nothing_to_capture(model, config, reasons)
    covered = {w.name for w in weights} | {w.bias for w in weights}
    uncovered = {name: reasons.get(name, "no captured module owns it") for name in sorted(trainable.keys() - covered)}
    return SketchPlan(tuple(weights), uncovered, config.rank, config.seed, config.blocks)


def _uses_of_weights(
    model: nn.Module, config: SketchConfig, names: dict[int, str], owner: Mapping[str, int | None]
) -> tuple[dict[str, list[str]], dict[str, str]]:
    """Weight name -> modules that use it; parameter name -> why it is left out."""
    uses: dict[str, list[str]] = {}
    reasons: dict[str, str] = {}
    for module_name, module, _ in walk(model):
        own = {id(p): names[id(p)] for p in module.parameters(recurse=False) if p.requires_grad}
        reason = _why_not(module_name, module, config)
        stacks = {key: own.get(id(getattr(module, key, None))) for key in stacks_of(module)}
        weight = own.get(id(getattr(module, "weight", None)))
        if stacks:
            for key, name in stacks.items():
                if not reason and name is not None and owner[name] is not None:
                    uses.setdefault(name, []).append(stack_name(module_name, key))
            reasons.update({name: reason or _NO_STACK for name in own.values() if name not in uses})
        elif not reason and weight is not None and owner[weight] is not None:
            uses.setdefault(weight, []).append(module_name)
            reasons.update({name: _OTHERS for name in own.values() if owner[name] != owner[weight]})
        else:
            reasons.update({name: reason or "its weight is frozen" for name in own.values() if name not in uses})
        reasons.update({name: _NOBODY for name in own.values() if owner[name] is None})
    return uses, reasons


def _why_not(name: str, module: nn.Module, config: SketchConfig) -> str:
    rule = rule_for(module)
    if isinstance(module, nn.ParameterDict | nn.ParameterList):
        return "a bare parameter: no layer of its own multiplies with it"
    stacks = stacks_of(module)
    if rule is None and not stacks:
        return f"{type(module).__name__} is not a known layer type"
    if not _matches(name, config.modules.split(",")) or _matches(name, config.exclude):
        return "left out by the settings"
    if stacks:
        return why_not_watched(module)
    return rule.why_not(module) if rule and isinstance(getattr(module, "weight", None), Tensor) else ""


def _matches(name: str, globs: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, glob.strip()) for glob in globs)


def _weight_plan(
    module: nn.Module | None,
    parameter: nn.Parameter,
    name: str,
    modules: list[str],
    names: dict[int, str],
    owner: Mapping[str, int | None],
    rank: int,
    offset: int,
) -> WeightPlan:
    """``module`` is the first that uses the weight; None for a stack of experts, one matrix above the other."""
    rule = rule_for(module) if module is not None else None
    columns = parameter.shape[-1] if rule is None else as_matrix(parameter).shape[1]
    rows, bias_axis = parameter.numel() // columns, 1 if rule is None else rule.bias_axis
    bias = getattr(module, "bias", None)
    with_bias = isinstance(bias, Tensor) and bias.requires_grad and owner[names[id(bias)]] == owner[name]
    if with_bias:
        rows, columns = (rows + 1, columns) if bias_axis == 0 else (rows, columns + 1)
    return WeightPlan(
        name=name,
        bias=names[id(bias)] if with_bias else "",
        bias_axis=bias_axis,
        modules=tuple(modules),
        rows=rows,
        columns=columns,
        left=min(rank, rows),
        right=min(rank, columns),
        offset=offset,
    )


def _nothing_to_capture(model: nn.Module, config: SketchConfig, reasons: dict[str, str]) -> UnsupportedLayerError:
    kinds = sorted({type(m).__name__ for m in model.modules() if any(p.requires_grad for p in m.parameters(False))})
    why = "; ".join(f"{name}: {reason}" for name, reason in list(reasons.items())[:5]) or "every parameter is frozen"
    return UnsupportedLayerError(
        f"No trainable module of {type(model).__name__} can be captured with modules={config.modules!r}, "
        f"exclude={list(config.exclude)}. Its trainable layers are of type {kinds}; known types are "
        f"{list(known_layers())}.",
        cause=why,
        fix="widen `modules`, unfreeze weights, or register the layer type (tap.layers.register_layer).",
    )
