"""What a forecast says: predicted changes with error bars, and which examples would cause them."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from trainer_attrib.analysis.forecasting.run import TrainingRow
from trainer_attrib.analysis.results import RELIABLE, Result
from trainer_attrib.analysis.tables import aligned, bars_of, cut, in_figure, require_matplotlib
from trainer_attrib.errors import ConfigurationError
from trainer_attrib.report.blocks import Bar, Bars, Block, Example, Grid, Notes, Ranking, Rankings


@dataclass(frozen=True)
class Shift:
    """Predicted change of one behavior by one method, in the behavior's unit.

    ``before`` is the behavior at the first weights. ``noise_floor`` is the shift by what batches do not agree on, half
    of them against the other half, with the error of measuring it; ``linear`` what the sum of all examples' first-order
    contributions predicts, nan where unknown. ``effective`` is the re-weighted sample's size as a share of its own.
    ``cost`` is in gradients, as a share of the run's.
    """

    behavior: str
    method: str
    before: float
    predicted: float
    error_bar: float
    noise_floor: float
    regime: str
    read_out: str
    effective: float
    linear: float
    cost: float

    @property
    def above_noise(self) -> bool:
        """Whether the shift can be told from what batches do not agree on."""
        return abs(self.predicted) > self.noise_floor

    @property
    def reliable(self) -> bool:
        """Whether its error bar is small enough for it to be relied on."""
        return self.above_noise and self.error_bar <= RELIABLE * abs(self.predicted)


@dataclass(frozen=True)
class Contribution:
    """What one example adds to the linear prediction of one behavior."""

    behavior: str
    example: str
    contribution: float
    source: str | None
    text: str


@dataclass(frozen=True, repr=False)
class Contributions(Result):
    """First-order contributions of all examples to predicted changes: positive ones increase the behavior.

    ``values`` is float64 [behaviors, N]; a row sums to the linear prediction of its behavior.
    """

    behaviors: tuple[str, ...]
    rows: tuple[TrainingRow, ...]
    values: np.ndarray
    caveats: tuple[str, ...] = ()
    kind = "contributions"

    def shown(self, most: int = 5000) -> dict[str, Any]:
        """Contributions of every example, or of the ``most`` strongest for any behavior, to six digits, with texts."""
        strongest = np.abs(self.values / np.abs(self.values).max(1, keepdims=True).clip(1e-300)).max(0)
        chosen = np.sort(np.argsort(-strongest, kind="stable")[:most])
        rows = [self.rows[place] for place in chosen]
        return {
            "behaviors": list(self.behaviors), "examples": len(self.rows),
            "sums": [float(row.sum()) for row in self.values],
            "rows": [{"example": row.id, "source": row.source, "text": cut(row.text, 2000)} for row in rows],
            "values": [[float(f"{v:.6g}") for v in row[chosen]] for row in self.values],
            "by_source": {name: self.by_source(name) for name in self.behaviors}, "caveats": list(self.caveats),
        }  # fmt: skip

    def of(self, behavior: str) -> np.ndarray:
        """Of one behavior, float64 [N].

        Raises:
            ConfigurationError: no such behavior.
        """
        if behavior not in self.behaviors:
            raise ConfigurationError(f"No behavior '{behavior}'.", fix=f"choose among {list(self.behaviors)}.")
        return self.values[self.behaviors.index(behavior)]

    def top(self, behavior: str, k: int = 10, *, against: bool = False) -> list[Contribution]:
        """The examples that most increase a behavior, or most decrease it; ties by id.

        Raises:
            ConfigurationError: no such behavior.
        """
        values = self.of(behavior)
        order = np.lexsort((np.array([row.id for row in self.rows]), values if against else -values))[:k]
        return [self._row(behavior, int(place)) for place in order]

    def by_source(self, behavior: str) -> dict[str, float]:
        """Sum of the contributions of each source, largest first; examples without one are under "".

        Raises:
            ConfigurationError: no such behavior.
        """
        sums: dict[str, float] = {}
        for row, value in zip(self.rows, self.of(behavior).tolist(), strict=True):
            sums[row.source or ""] = sums.get(row.source or "", 0.0) + value
        return dict(sorted(sums.items(), key=lambda pair: -pair[1]))

    def to_table(self) -> pa.Table:
        """Columns behavior, example, contribution, source, text."""
        rows = [asdict(self._row(name, place)) for name in self.behaviors for place in range(len(self.rows))]
        return pa.Table.from_pylist(rows)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: the ten strongest each way, and the sums."""
        return {
            name: {
                "sum": float(self.of(name).sum()),
                "by_source": self.by_source(name),
                "for": [asdict(row) for row in self.top(name)],
                "against": [asdict(row) for row in self.top(name, against=True)],
            }
            for name in self.behaviors
        }

    def blocks(self) -> list[Block]:
        """The strongest examples each way, the sums by source."""
        rankings = [
            Ranking(f"{name}: {self.of(name).sum():+.4f} in all", *(
                [Example(r.contribution, r.example, "", 0, r.source or "", r.text) for r in self.top(name, against=way)]
                for way in (False, True)
            ))
            for name in self.behaviors
        ]  # fmt: skip
        sums = [(name, source, value) for name in self.behaviors for source, value in self.by_source(name).items()]
        return [
            Rankings("Which examples would do it", rankings, "First-order contributions to the predicted change."),
            *([Grid("By source", ("behavior", "source", "contribution"), sums)] if any(s for _, s, _ in sums) else []),
            Notes("What to keep in mind", self.caveats),
        ]

    def plot(self) -> Any:
        """A matplotlib figure: the sorted contributions to each behavior. Needs the extra ``plot``."""
        figure, axis = require_matplotlib().subplots(figsize=(7, 3), layout="tight")
        for name in self.behaviors:
            axis.plot(np.sort(self.of(name))[::-1], label=in_figure(name))
        axis.axhline(0, color="black", linewidth=0.8)
        axis.set(xlabel="examples, sorted", ylabel="contribution")
        axis.legend()
        return figure

    def __repr__(self) -> str:
        cells = []
        for name in self.behaviors:
            cells.append((name, f"{self.of(name).sum():+.4f}", f"sum over {len(self.rows)} examples"))
            rows = [*self.top(name, 3), *reversed(self.top(name, 3, against=True))]
            cells += [("", f"{row.contribution:+.5f}", f"{row.example}: {row.text}") for row in rows]
        return aligned(("behavior", "contribution", "example"), cells, self.caveats)

    def _row(self, behavior: str, place: int) -> Contribution:
        row = self.rows[place]
        return Contribution(behavior, row.id, float(self.of(behavior)[place]), row.source, row.text)


@dataclass(frozen=True, repr=False)
class Shifts(Result):
    """A table of predicted changes, one row per behavior and method."""

    rows: tuple[Shift, ...]
    caveats: tuple[str, ...] = ()
    kind = "forecast"

    def shown(self) -> dict[str, Any]:
        """As :meth:`to_dict`."""
        return self.to_dict()

    def of(self, behavior: str) -> Shift:
        """The first method's prediction for a behavior.

        Raises:
            ConfigurationError: no such behavior.
        """
        for row in self.rows:
            if row.behavior == behavior:
                return row
        names = list(dict.fromkeys(row.behavior for row in self.rows))
        raise ConfigurationError(f"No behavior '{behavior}'.", fix=f"choose among {names}.")

    def to_table(self) -> pa.Table:
        """Columns behavior, method, before, predicted, error_bar, noise_floor, regime, read_out, effective, linear,
        cost."""
        return pa.Table.from_pylist([asdict(row) for row in self.rows])

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        told = [asdict(row) | {"above_noise": row.above_noise, "reliable": row.reliable} for row in self.rows]
        return {"rows": told, "caveats": list(self.caveats)}

    def blocks(self) -> list[Block]:
        """Bars by method, the table, the caveats."""
        bars = [Bar(r.behavior, r.method, r.predicted, r.error_bar, r.reliable) for r in self.rows]
        columns = ("behavior", "method", "before", "predicted", "error bar", "noise floor", "regime", "read-out",
                   "effective", "linear", "cost")  # fmt: skip
        cells = [tuple(asdict(row).values()) for row in self.rows]
        note = "Behavior after the run minus behavior before it. Pale: not reliable, or below the noise floor."
        return [
            Bars("What the run would change", bars, note=note),
            Grid("Forecast", columns, cells),
            Notes("What to keep in mind", self.caveats),
        ]

    def plot(self) -> Any:
        """A matplotlib figure: predicted changes with error bars. Needs the extra ``plot``."""
        figure, axis = require_matplotlib().subplots(figsize=(7, 1 + 0.3 * len(self.rows)), layout="tight")
        rows = self.rows[::-1]
        labels = [f"{r.behavior}, {r.method}" for r in rows]
        bars_of(axis, labels, [r.predicted for r in rows], [r.error_bar for r in rows])
        axis.set_xlabel("predicted change")
        return figure

    def __repr__(self) -> str:
        cells = [
            (r.behavior, r.method, f"{r.before:.3f}", f"{r.predicted:+.4f} ± {r.error_bar:.4f}", _remark(r), r.regime)
            for r in self.rows
        ]
        return aligned(("behavior", "method", "before", "predicted change", "", "regime"), cells, self.caveats)


def _remark(row: Shift) -> str:
    if not row.above_noise:
        return f"below the noise floor ({row.noise_floor:.4f})"
    return "" if row.reliable else "not reliable"
