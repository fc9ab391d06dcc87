"""Queries as rows: the gradient of a behavior, sketched exactly as the training examples' gradients were."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trainer_attrib.analysis.behavior import Behavior
from trainer_attrib.analysis.gradient_rows import GradientRows
from trainer_attrib.errors import NotComparableError
from trainer_attrib.execution.runner import Runner, Serial
from trainer_attrib.ledger.reader import StageReader
from trainer_attrib.tap.names import parameters_by_name
from trainer_attrib.tap.plan import SketchPlan
from trainer_attrib.tap.projections import Projections

Sketcher = Callable[[StageReader, int], Tensor]
"""Stage and version of its second moments -> sketches of all queries, [Q, width]."""


def sketch_queries(
    model: nn.Module, stage: StageReader, version: int, behaviors: Sequence[Behavior], runner: Runner | None = None
) -> Tensor:
    """Sketches of the gradients of every query of every behavior at the model's current weights.

    They are scaled by the second moments V of one version, in such units that the product with a row is that of the two
    gradients with each divided by sqrt(V), and columns that the stage's rows leave out are zero, so that
    they can be compared with that version's rows and with no others. So are the columns of weights that the model does
    not have (:func:`missing_weights`).

    Returns:
        float32 [Q, width] on the CPU, Q counted over all behaviors in order.

    Raises:
        NotComparableError: the model has none of the weights.
    """
    runner = runner or Serial()
    queries = [(behavior, query) for behavior, asked in enumerate(behaviors) for query in range(len(asked))]
    size = -(-len(queries) // runner.workers)
    shares = [queries[at : at + size] for at in range(0, len(queries), size)]
    return torch.cat(list(runner.map(_QuerySketcher(model, stage, version, behaviors), shares)))


@dataclass(frozen=True)
class _QuerySketcher:
    """Sketches some of the queries, each by itself: (behavior, query) by number -> [len, width]."""

    model: nn.Module
    stage: StageReader
    version: int
    behaviors: Sequence[Behavior]

    def __call__(self, queries: Sequence[tuple[int, int]]) -> Tensor:
        model, stage = self.model, self.stage
        whole = SketchPlan.from_dict(stage.meta["plan"])
        plan = whole.of_weights(_names(whole) - _missing(model, whole, stage))
        projections = Projections(plan, model, stage.factors(self.version), self.version)
        with GradientRows(model, projections).opened() as found:
            rows = torch.stack([found.of_query(self.behaviors[b], q).float().cpu() for b, q in queries])
        sketched = torch.zeros(len(rows), whole.width)
        for weight, part in zip((w for w in whole.weights if w.name in _names(plan)), plan.weights, strict=True):
            sketched[:, weight.span] = rows[:, part.span]
        return whole.pool(sketched * kept_entries(model, stage)) / projections.unit**2


def sketch_vectors(
    model: nn.Module, stage: StageReader, version: int, vectors: Sequence[Mapping[str, Tensor]]
) -> Tensor:
    """Sketches of vectors of weight space, scaled and left out as :func:`sketch_queries` does it.

    Args:
        model: whose weights the vectors are about.
        stage: whose rows they are compared with.
        version: of the second moments.
        vectors: parameter name -> values; what is not named is 0.

    Returns:
        float32 [len(vectors), width] on the CPU.

    Raises:
        NotComparableError: the model has none of the weights.
    """
    whole = SketchPlan.from_dict(stage.meta["plan"])
    plan = whole.of_weights(_names(whole) - _missing(model, whole, stage))
    projections, places = Projections(plan, model, stage.factors(version), version), parameters_by_name(model)

    def part(vector: Mapping[str, Tensor], name: str) -> Tensor:
        value = vector.get(name)
        return torch.zeros_like(places[name]) if value is None else value.to(places[name])

    sketched = torch.zeros(len(vectors), whole.width)
    for weight in (w for w in whole.weights if w.name in _names(plan)):
        for row, vector in zip(sketched, vectors, strict=True):
            bias = part(vector, weight.bias) if weight.bias else None
            row[weight.span] = projections.sketch(weight, part(vector, weight.name), bias).flatten().float().cpu()
    return whole.pool(sketched * kept_entries(model, stage)) / projections.unit**2


def missing_weights(model: nn.Module, stage: StageReader) -> list[str]:
    """The weights of a stage's rows that the model does not have, or has in another shape.

    Raises:
        NotComparableError: all of them.
    """
    return sorted(_missing(model, SketchPlan.from_dict(stage.meta["plan"]), stage))


def _missing(model: nn.Module, plan: SketchPlan, stage: StageReader) -> set[str]:
    shapes = {name: list(p.shape) for name, p in parameters_by_name(model).items()}
    then = {name: entry["shape"] for name, entry in stage.weights_at("start").items()}
    fits = {w.name for w in plan.weights if w.name in shapes and shapes[w.name] == then.get(w.name, shapes[w.name])}
    missing = _names(plan) - fits
    if len(missing) == len(plan.weights):
        raise NotComparableError(
            f"The rows of stage '{stage.name}' are gradients of {len(missing)} weights that this model does not have "
            f"({', '.join(sorted(missing)[:3])}{', ...' if len(missing) > 3 else ''}).",
            cause="its adapter was merged into the model, or the layers were replaced.",
            fix="analyze the model as it was at the end of that stage, with its adapter, or choose other `stages`.",
        )
    return missing


def kept_columns(model: nn.Module, stage: StageReader) -> Tensor:
    """1 for the columns of a stage's rows that are compared with the model's gradients, 0 for the others: [width]. A
    block of which some weights are compared is, as a whole."""
    pooled = SketchPlan.from_dict(stage.meta["plan"]).pool(kept_entries(model, stage)[None])[0]
    return (pooled > 0).float()


def kept_entries(model: nn.Module, stage: StageReader) -> Tensor:
    """The same for the entries of a sketch, before weights are pooled: [width of the plan]."""
    plan = SketchPlan.from_dict(stage.meta["plan"])
    keep = torch.ones(plan.width)
    left_out = {*(stage.meta["coverage"] or {}).get("partial", {}), *_missing(model, plan, stage)}
    for weight in plan.weights:
        if weight.name in left_out:
            keep[weight.span] = 0
    return keep


def _names(plan: SketchPlan) -> set[str]:
    return {weight.name for weight in plan.weights}
