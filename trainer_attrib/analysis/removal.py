"""Taking a stage out of a trained model: its weights moved towards where they would be without it, as far as helps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from torch import nn

from trainer_attrib.analysis.behavior import Behavior
from trainer_attrib.analysis.displacement import Displacement, moved
from trainer_attrib.analysis.effects.estimate import Estimate, Method, estimate
from trainer_attrib.analysis.effects.lineage import Lineage
from trainer_attrib.analysis.results import Result
from trainer_attrib.analysis.tables import aligned, in_figure, require_matplotlib
from trainer_attrib.analysis.training_state import TrainingState, put
from trainer_attrib.errors import ConfigurationError, NotComparableError
from trainer_attrib.ledger.reader import StageReader
from trainer_attrib.report.blocks import Block, Curve, Curves, Grid, Notes
from trainer_attrib.tap.names import parameters_by_name

SCALES = tuple(float(scale) for scale in np.linspace(0, 1.5, 13))


@dataclass(frozen=True)
class RemovalPoint:
    """A model moved by ``scale`` times the predicted displacement.

    ``improved`` is the smallest mean of the behaviors to improve, ``kept`` the means of those to keep, in their order.
    """

    scale: float
    improved: float
    kept: tuple[float, ...]
    allowed: bool


@dataclass(frozen=True, repr=False)
class Removal(Result):
    """A displacement of a model's weights that takes a stage out of it, and how far to go.

    ``displacement`` is that of ``chosen``: parameter name -> change, float64. Nothing is changed until :meth:`apply`.
    """

    stage: str
    method: str
    improve: tuple[str, ...]
    keep: tuple[str, ...]
    chosen: RemovalPoint
    points: tuple[RemovalPoint, ...]
    displacement: Displacement
    caveats: tuple[str, ...] = ()

    @property
    def before(self) -> RemovalPoint:
        """The model as it is."""
        return next(point for point in self.points if point.scale == 0)

    def apply(self, model: nn.Module) -> nn.Module:
        """Move the weights of a model (the analyzed one or a copy of it), in place, for good; returns it.

        Raises:
            NotComparableError: the model has not the weights that would be moved.
        """
        parameters = parameters_by_name(model)
        missing = sorted(
            n for n, d in self.displacement.items() if n not in parameters or parameters[n].shape != d.shape
        )
        if missing:
            raise NotComparableError(
                f"This model lacks {len(missing)} of the weights to be moved ({', '.join(missing[:3])}).",
                fix="apply the removal to the analyzed model or a copy of it.",
            )
        target = {n: parameters[n].detach().double().cpu() + d for n, d in self.displacement.items()}
        put(model, TrainingState(target))
        return model

    def to_table(self) -> pa.Table:
        """Columns scale, improved, allowed, and one per behavior to keep."""
        kept = [dict(zip(self.keep, point.kept, strict=True)) for point in self.points]
        rows = zip(self.points, kept, strict=True)
        return pa.Table.from_pylist(
            [{"scale": p.scale, "improved": p.improved, "allowed": p.allowed, **k} for p, k in rows]
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, without the displacement."""
        return {
            "stage": self.stage, "method": self.method, "improve": list(self.improve), "keep": list(self.keep),
            "chosen": asdict(self.chosen), "points": [asdict(p) for p in self.points], "caveats": list(self.caveats),
        }  # fmt: skip

    def blocks(self) -> list[Block]:
        """The curve over scales, the table, the caveats."""
        lines = [Curve("worst of what is to improve", self._scales(), [p.improved for p in self.points])]
        lines += [
            Curve(name, self._scales(), [p.kept[number] for p in self.points]) for number, name in enumerate(self.keep)
        ]
        rows = [(p.scale, p.improved, *p.kept, p.allowed, p is self.chosen) for p in self.points]
        columns = ("scale", "worst to improve", *self.keep, "allowed", "chosen")
        title = f"Removing stage {self.stage}"
        return [Curves(title, lines), Grid(title, columns, rows), Notes("What to keep in mind", self.caveats)]

    def plot(self) -> Any:
        """A matplotlib figure: behaviors over the scale of the displacement. Needs the extra ``plot``."""
        figure, axis = require_matplotlib().subplots(figsize=(7, 3.5), layout="tight")
        axis.plot(self._scales(), [p.improved for p in self.points], marker="o", label="worst of what is to improve")
        for number, name in enumerate(self.keep):
            axis.plot(self._scales(), [p.kept[number] for p in self.points], linestyle="--", label=in_figure(name))
        axis.axvline(self.chosen.scale, color="black", linewidth=0.8)
        axis.set(xlabel="scale of the displacement", title=in_figure(f"Removing stage {self.stage} ({self.method})"))
        axis.legend()
        return figure

    def _scales(self) -> list[float]:
        return [point.scale for point in self.points]

    def __repr__(self) -> str:
        rows = [
            (f"{p.scale:.3g}", f"{p.improved:+.3f}", *(f"{k:+.3f}" for k in p.kept), self._mark(p)) for p in self.points
        ]
        return aligned(("scale", "worst to improve", *self.keep, ""), rows, self.caveats)

    def _mark(self, point: RemovalPoint) -> str:
        return "chosen" if point.scale == self.chosen.scale else ("" if point.allowed else "loses too much")


@dataclass(frozen=True)
class Search:
    """How far to go.

    Args:
        improve: the smallest of their means is to become as large as possible; one per group for a worst group.
        keep: their means may not fall.
        tolerance: by how much they may after all, in their units.
        scales: of the displacement that are tried; 1 is what the method predicts, 0 the model as it is.
    """

    improve: Sequence[Behavior]
    keep: Sequence[Behavior] = ()
    tolerance: float = 0.02
    scales: Sequence[float] = SCALES


def remove(lineage: Lineage, stage: StageReader, method: Method, search: Search) -> Removal:
    """The best allowed point on the line from the trained model to the predicted one without the stage.

    Raises:
        ConfigurationError: nothing to improve, or a method that predicts no weights.
        AnalysisError: something is missing that the method needs.
    """
    if not search.improve:
        raise ConfigurationError(
            "Nothing to improve.", fix="pass the behaviors that the stage spoils as improve=[...]."
        )
    method.check(lineage, stage)
    found = estimate(method, lineage, stage)
    if found.displacement is None:
        raise ConfigurationError(
            f"Method '{found.method or method.name}' does not predict weights without the stage.",
            fix="use 'replay', 'shadow', 'propagate', 'subtract' or 'retrain'.",
        )
    points = [_point(lineage.model, found.displacement, scale, search) for scale in sorted({0.0, *search.scales})]
    lowest = [value - search.tolerance for value in next(p for p in points if p.scale == 0).kept]
    points = [_judged(point, lowest) for point in points]
    chosen = max((p for p in points if p.allowed), key=lambda point: (point.improved, -abs(point.scale)))
    return Removal(
        stage.name, found.method or method.name, tuple(b.name for b in search.improve),
        tuple(b.name for b in search.keep), chosen, tuple(points),
        {name: chosen.scale * change for name, change in found.displacement.items()}, _caveats(lineage, found),
    )  # fmt: skip


def _point(model: nn.Module, displacement: Displacement, scale: float, search: Search) -> RemovalPoint:
    with moved(model, {name: scale * change for name, change in displacement.items()}):
        improved, kept = (
            [float(behavior.values(model).mean()) for behavior in group] for group in (search.improve, search.keep)
        )
    return RemovalPoint(scale, min(improved), tuple(kept), True)


def _judged(point: RemovalPoint, lowest: Sequence[float]) -> RemovalPoint:
    allowed = all(value >= least for value, least in zip(point.kept, lowest, strict=True))
    return RemovalPoint(point.scale, point.improved, point.kept, allowed)


def _caveats(lineage: Lineage, found: Estimate) -> tuple[str, ...]:
    said = ["the scale was chosen on these behaviors: measure the result on others that it has not seen"]
    if lineage.end(lineage.stages[-1]).buffers:
        said.append("buffers (running norms) stay as they are; only weights are moved")
    return (*said, *found.notes)
