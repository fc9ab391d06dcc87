"""A stage's effect split over its steps, examples and sources.

The adjoint at the stage's end weighs every executed update: between two snapshots exactly, and among the steps between
them by the sketches of the weights that every step recorded. A step's part is divided among its examples by how much
their gradients agree with it. Everything is scaled to the effect that a method of the ladder measured: linear parts of
a whole stage do not add up to its effect, and under Adam those of its examples would even add up to 0.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn

from trainer_attrib.analysis.behavior import Behavior
from trainer_attrib.analysis.displacement import Displacement
from trainer_attrib.analysis.effects.estimate import Method, estimate
from trainer_attrib.analysis.effects.lineage import Lineage
from trainer_attrib.analysis.effects.propagate import Propagate
from trainer_attrib.analysis.effects.slopes import gradients, inner
from trainer_attrib.analysis.query_sketches import kept_entries, sketch_vectors
from trainer_attrib.analysis.tables import aligned
from trainer_attrib.errors import NotComparableError
from trainer_attrib.ledger.reader import StageReader
from trainer_attrib.tap.names import parameters_by_name
from trainer_attrib.tap.plan import SketchPlan


@dataclass(frozen=True, repr=False)
class Split:
    """Parts of one stage's mean effect on one behavior.

    ``steps``, ``examples`` and ``sources`` map step number, example id and source to its part, in the behavior's unit;
    each of the three adds up to ``effect``. ``additivity`` is the sum of the linear parts over the effect, before they
    were scaled to it: far from 1, the parts are to be read as shares only.
    """

    behavior: str
    stage: str
    method: str
    effect: float
    error_bar: float
    additivity: float
    steps: Mapping[int, float]
    examples: Mapping[str, float]
    sources: Mapping[str, float]
    caveats: tuple[str, ...] = ()

    def to_table(self) -> pa.Table:
        """Columns behavior, stage, kind (``step``, ``example`` or ``source``), name, part; largest parts first."""
        rows = []
        for kind, parts in (("step", self.steps), ("example", self.examples), ("source", self.sources)):
            for name, part in sorted(parts.items(), key=lambda item: -abs(item[1])):
                rows.append(
                    {"behavior": self.behavior, "stage": self.stage, "kind": kind, "name": str(name), "part": part}
                )
        return pa.Table.from_pylist(rows)

    def __repr__(self) -> str:
        table = self.to_table().to_pylist()
        rows = [r for kind in ("source", "example", "step") for r in [x for x in table if x["kind"] == kind][:5]]
        cells = [(row["kind"], f"{row['part']:+.4f}", row["name"]) for row in rows]
        head = f"{self.behavior}, stage {self.stage}: {self.effect:+.3f} ± {self.error_bar:.3f} by {self.method}"
        return "\n".join([head, aligned(("", "part", ""), cells, self.caveats)])


def split(lineage: Lineage, stage: StageReader, method: Method, carry: Propagate) -> list[Split]:
    """A stage's effect on every behavior of the lineage, mean over its queries, in parts.

    Raises:
        NotComparableError: the stage did not record its steps' weights, or a later stage cannot be passed through.
        AnalysisError: something is missing that the method needs.
    """
    method.check(lineage, stage)
    carry.check_back(lineage, stage)
    found = estimate(method, lineage, stage)
    return [
        _split(lineage, stage, behavior, carry, found.method or method.name, float(effects.mean()), float(bars.mean()))
        for behavior, effects, bars in zip(lineage.behaviors, found.effects, found.error_bars, strict=True)
    ]


def _split(
    lineage: Lineage, stage: StageReader, behavior: Behavior, carry: Propagate, method: str, effect: float, bar: float
) -> Split:
    back = carry.carry_back(lineage, stage, _mean_gradient(lineage, behavior))
    raw = sketch_vectors(lineage.model, stage, 0, [back])[0]
    linear = _of_steps(lineage.model, stage, back, raw)
    total = sum(linear.values())
    scale = effect / total if total else 0.0
    steps = {step: scale * part for step, part in linear.items()}
    examples = _of_examples(lineage, stage, back, steps)
    described = {row["example"]: row["source"] for row in stage.examples().to_pylist()}
    sources: dict[str, float] = defaultdict(float)
    for example, part in examples.items():
        sources[described.get(example) or "unknown"] += part
    additivity = total / effect if effect else float("inf")
    said = [f"the linear parts add up to {additivity:.2f} of the measured effect, to which they were scaled"]
    if not 0.5 <= additivity <= 2:
        said.append("so far from 1 that even the signs of parts are uncertain")
    return Split(behavior.name, stage.name, method, effect, bar, additivity, steps, examples, dict(sources), (*said,))


def _mean_gradient(lineage: Lineage, behavior: Behavior) -> Displacement:
    places = {name: p.detach() for name, p in parameters_by_name(lineage.model).items()}
    total = {name: torch.zeros(place.shape).double() for name, place in places.items()}
    for gradient in gradients(lineage.model, behavior, places):
        for name, value in gradient.items():
            total[name] += value / len(behavior)
    return total


def _of_steps(model: nn.Module, stage: StageReader, back: Displacement, raw_K: Tensor) -> dict[int, float]:
    """Linear part of every step. Those between two snapshots add up to the exact inner product with what happened
    between them; sketches only divide it."""
    sketched = _sketched_steps(model, stage, raw_K)
    snapshots = sorted(stage.meta["snapshots"], key=lambda entry: entry["step"])
    found = {}
    for first, last in itertools.pairwise(snapshots):
        start, end = stage.snapshot(first["name"]), stage.snapshot(last["name"])
        exact = float(inner(back, {name: end[name].double() - start[name].double() for name in end}))
        between = {step: part for step, part in sketched.items() if first["step"] < step <= last["step"]}
        missed = exact - sum(between.values())
        found.update({step: part + missed / len(between) for step, part in between.items()})
    return found


def _sketched_steps(model: nn.Module, stage: StageReader, raw_K: Tensor) -> dict[int, float]:
    rows = stage.steps().select(["step", "projected_weights"]).to_pylist()
    if not rows or rows[0]["projected_weights"] is None:
        raise NotComparableError(
            f"Stage '{stage.name}' has no sketches of its steps' weights.",
            cause="it was recorded by an earlier version, or recorded no step.",
            fix="record the stage again, or ask for the whole stage's effect.",
        )
    before = sketch_vectors(model, stage, 0, [stage.snapshot("start")])[0]
    plan, kept = SketchPlan.from_dict(stage.meta["plan"]), kept_entries(model, stage)
    found = {}
    for row in rows:
        after = plan.pool(torch.from_numpy(np.frombuffer(row["projected_weights"], np.float32).copy())[None] * kept)[0]
        found[row["step"]] = float(raw_K @ (after - before))
        before = after
    return found


def _of_examples(
    lineage: Lineage, stage: StageReader, back: Displacement, steps: Mapping[int, float]
) -> dict[str, float]:
    """Each step's part divided among its recorded examples: by how their descent agrees with it, equally where their
    agreements nearly cancel. A step without recorded examples is divided among all."""
    sketches: dict[int, Tensor] = {}
    visits: dict[int, list[tuple[str, float]]] = defaultdict(list)
    for block in stage.rows():
        table = block.table.select(["example", "step", "norm", "version"]).to_pylist()
        for row, sketch in zip(table, block.sketches, strict=True):
            version = row["version"]
            if version not in sketches:
                sketches[version] = sketch_vectors(lineage.model, stage, version, [back])[0]
            agreement = -float(sketches[version] @ torch.from_numpy(np.array(sketch, np.float32))) * row["norm"]
            visits[row["step"]].append((row["example"], agreement))
    found: dict[str, float] = defaultdict(float)
    rest = sum(part for step, part in steps.items() if step not in visits)
    for step, seen in visits.items():
        for example, share in _shares(seen):
            found[example] += steps.get(step, 0.0) * share
    for example in list(found):
        found[example] += rest / len(found)
    return dict(found)


def _shares(seen: Sequence[tuple[str, float]]) -> list[tuple[str, Any]]:
    total, size = sum(a for _, a in seen), sum(abs(a) for _, a in seen)
    if abs(total) <= 0.1 * size:
        return [(example, 1 / len(seen)) for example, _ in seen]
    return [(example, agreement / total) for example, agreement in seen]
