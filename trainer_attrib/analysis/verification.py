"""Training a stage again without its suspects: is the error gone, and what else changed?"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn

from trainer_attrib.analysis.behavior import Behavior
from trainer_attrib.analysis.effects.lineage import Lineage
from trainer_attrib.analysis.examples import Examples
from trainer_attrib.analysis.matching import places_of
from trainer_attrib.analysis.programs import Program
from trainer_attrib.analysis.recorded_steps import RecordedOrder, RecordedSteps
from trainer_attrib.analysis.results import Result
from trainer_attrib.analysis.retraining import retrain
from trainer_attrib.analysis.suspects import Suspects
from trainer_attrib.analysis.tables import aligned, bars_of, in_figure, require_matplotlib
from trainer_attrib.analysis.training_state import TrainingState, state_of
from trainer_attrib.errors import ConfigurationError, MissingDataError, NotComparableError
from trainer_attrib.ledger.reader import StageReader
from trainer_attrib.report.blocks import Bar, Bars, Block, Grid, Notes

ProgramWithout = Callable[[Any, frozenset[str]], Any]
"""(model, ids of the examples to leave out) -> what a program returns: a trainer of that very model."""
DRIFTED = 0.05
"""Distance from the record, over what the stage changed, from which on a stage run again is called another training."""
COLUMNS = ("before", "trained", "again", "without", "random")


@dataclass(frozen=True)
class Outcome:
    """One query's behavior at the ends of five trainings: before the stage, as it was recorded, run again with all
    examples, without the suspects, and without as many random ones (mean over the draws).

    ``kind`` is ``"error"`` for what is to go away and ``"other"`` for what is to stay; ``unit`` of the behavior.
    """

    kind: str
    behavior: str
    query: str
    before: float
    trained: float
    again: float
    without: float
    random: float
    unit: str


@dataclass(frozen=True, repr=False)
class Verification(Result):
    """What training a stage again without suspects did, query by query.

    ``drift`` is the distance of the weights after running the stage again with all examples from those recorded, over
    what the stage changed: 0 is bit for bit. ``removed`` examples of ``examples`` were left out.
    """

    stage: str
    removed: int
    examples: int
    drift: float
    rows: tuple[Outcome, ...]
    caveats: tuple[str, ...] = ()

    def to_table(self) -> pa.Table:
        """Columns kind, behavior, query, before, trained, again, without, random, unit."""
        return pa.Table.from_pylist([asdict(row) for row in self.rows])

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "stage": self.stage, "removed": self.removed, "examples": self.examples, "drift": self.drift,
            "rows": [asdict(row) for row in self.rows], "means": [asdict(row) for row in self.summary()],
            "undone": {name: self.undone(name) for name in self._errors()}, "caveats": list(self.caveats),
        }  # fmt: skip

    def summary(self) -> list[Outcome]:
        """Mean over the queries of each behavior; ``query`` is their number."""
        groups: dict[tuple[str, str], list[Outcome]] = {}
        for row in self.rows:
            groups.setdefault((row.kind, row.behavior), []).append(row)
        return [_mean(rows) for rows in groups.values()]

    def undone(self, behavior: str, arm: str = "without") -> float | None:
        """Share of what the stage added to the behavior that is gone: (again - without) / (again - before), of means
        over queries. 1 is all of it; None where the stage added nothing.

        Args:
            behavior: by name.
            arm: ``"without"`` the suspects, or the control without as many ``"random"`` examples.
        """
        mean = next(row for row in self.summary() if row.behavior == behavior)
        added = mean.again - mean.before
        return (mean.again - getattr(mean, arm)) / added if added > 0 else None

    def blocks(self) -> list[Block]:
        """Bars of what the stage added with and without, the means, every query, the caveats."""
        bars = [Bar(behavior, name, change) for behavior, name, change in self._changes()]
        note = "Change against the same training with all examples, mean over queries."
        header = ("kind", "behavior", "queries", *_HEADS, "unit")
        means = [tuple(asdict(row).values()) for row in self.summary()]
        queries = [tuple(asdict(row).values()) for row in self.rows if row.kind == "error"]
        return [
            Bars(self._title(), bars, "", note),
            Grid("Means", header, means, " ".join(self._lines())),
            Grid("Queries of the error", ("kind", "behavior", "query", *header[3:]), queries),
            Notes("What to keep in mind", self.caveats),
        ]

    def plot(self) -> Any:
        """A matplotlib figure: changes against the training with all examples. Needs the extra ``plot``."""
        rows = list(self._changes())[::-1]
        figure, axis = require_matplotlib().subplots(figsize=(7, 1 + 0.3 * len(rows)), layout="tight")
        bars_of(axis, [f"{behavior}: {name}" for behavior, name, _ in rows], [change for _, _, change in rows])
        axis.set(xlabel="change of the behavior, mean over queries", title=in_figure(self._title()))
        return figure

    def _title(self) -> str:
        return f"Stage {self.stage} again without {self.removed} of {self.examples:,} examples"

    def _changes(self) -> Iterator[tuple[str, str, float]]:
        """(behavior, what was left out, change against the same training with all examples)."""
        for mean in self.summary():
            for arm, name in (("without", "the suspects"), ("random", "as many random examples")):
                yield mean.behavior, f"without {name}", getattr(mean, arm) - mean.again

    def __repr__(self) -> str:
        head = f"{self._title()} (means over queries)".replace("Stage", "stage", 1)
        cells = [
            (row.kind, row.behavior, row.query, *(f"{getattr(row, name):+.3f}" for name in COLUMNS), row.unit)
            for row in self.summary()
        ]
        table = aligned(("", "behavior", "queries", *COLUMNS, ""), cells)
        legend = (
            "before the stage; trained, as recorded; again, with all examples; without suspects; without random ones"
        )
        return "\n".join([head, table, legend, *self._lines(), *(f"note: {caveat}" for caveat in self.caveats)])

    def _errors(self) -> list[str]:
        return list(dict.fromkeys(row.behavior for row in self.rows if row.kind == "error"))

    def _lines(self) -> Iterator[str]:
        """What became of each error, one sentence each."""
        for name in self._errors():
            gone, by_chance = (self.undone(name, arm) for arm in ("without", "random"))
            rows = [row for row in self.rows if row.behavior == name and row.kind == "error"]
            if gone is None or by_chance is None:
                yield f"{name}: the stage added nothing to it."
                continue
            line = f"{name}: {gone:.0%} of what the stage added is gone without the suspects, {by_chance:.0%} without "
            line += "as many random examples"
            counts = [sum(getattr(row, arm) > 0 for row in rows) for arm in ("again", "without", "random")]
            if counts[0]:
                line += f"; above 0 are {counts[0]} of {len(rows)} queries with all examples, {counts[1]} without the "
                line += f"suspects, {counts[2]} without random ones"
            yield f"{line}."


_HEADS = ("before the stage", "trained", "again with all", "without suspects", "without random")


@dataclass(frozen=True)
class Removed:
    """What is to be left out, and what to look at.

    Args:
        suspects: of the stage.
        examples: all that the stage was trained on.
        errors: behaviors that are to go away, larger for more of the error.
        others: that are to stay.
        program: trains the stage without examples; None: made from the ledger and the examples.
        draws: sets of random examples, for the control.
        seed: of these.
    """

    suspects: Suspects
    examples: Examples
    errors: Sequence[Behavior]
    others: Sequence[Behavior] = ()
    program: ProgramWithout | None = None
    draws: int = 1
    seed: int = 0

    def places(self, stage: StageReader) -> frozenset[int]:
        """Where the suspects are among the examples.

        Raises:
            ConfigurationError: no suspect is of the stage, or all of its examples are suspects.
            MissingDataError: a suspect is not among the examples.
        """
        of_stage = self.suspects.of_stage(stage.name)
        found = places_of(
            [s.example for s in of_stage], [s.text for s in of_stage], self.examples.ids, self.examples.texts
        )
        if missing := [s.example for s, places in zip(of_stage, found, strict=True) if not places]:
            raise MissingDataError(
                f"{len(missing)} of {len(of_stage)} suspects are not among the {len(self.examples)} given examples: "
                f"{missing[:3]}.",
                fix="pass the examples that the stage was trained on, with the ids that they were recorded by.",
            )
        places = frozenset(place for places in found for place in places)
        if not 0 < len(places) < len(self.examples):
            raise ConfigurationError(
                f"{len(places)} of the {len(self.examples)} examples of stage '{stage.name}' are suspects.",
                fix="choose suspects of this stage, fewer than it has examples.",
            )
        return places

    def behaviors(self, left_out: frozenset[int]) -> list[Behavior]:
        """All that is measured, the losses of the examples last."""
        kept = self.examples.some([place for place in range(len(self.examples)) if place not in left_out])
        gone = self.examples.some(sorted(left_out))
        losses = (loss_of("loss of the examples kept", kept), loss_of("loss of the suspects", gone))
        return [*self.errors, *self.others, *losses]


def loss_of(name: str, examples: Examples) -> Behavior:
    """The losses of examples as a behavior, larger meaning that the model knows them less."""
    return Behavior(name, examples.dataset, examples.loss, list(examples.ids), examples.batch_size, "loss")


def verify_removal(view: Callable[[Sequence[Behavior]], Lineage], stage: StageReader, asked: Removed) -> Verification:
    """Train a stage again from its recorded start with all examples, without the suspects, and without as many random
    ones. The model and all random states stay as they are.

    Args:
        view: behaviors -> the model with its stages.
        stage: that was trained on the suspects.
        asked: what is left out and measured.

    Raises:
        ConfigurationError: no suspects of this stage, all of its examples, or no error.
        MissingDataError: not all examples of the stage are given.
        NotComparableError: the ledger does not say how to run the stage again, or it diverged.
    """
    if not asked.errors or asked.draws < 1:
        raise ConfigurationError(
            f"{len(asked.errors)} behaviors of the error and {asked.draws} random draws.",
            fix="give at least one of each.",
        )
    left_out = asked.places(stage)
    lineage = view(asked.behaviors(left_out))
    lineage.timeline.check_trainable([stage])
    program_of, notes = _programs(stage, asked)
    start, recorded = lineage.start(stage), lineage.end(stage)

    def trained(without: frozenset[int]) -> TrainingState:
        state = retrain(lineage.model, start, [stage], {stage.name: program_of(without)})
        return _finite(state, stage)

    again = trained(frozenset())
    drift = _drift(lineage, stage, again)
    random = [lineage.measure(trained(drawn)) for drawn in _drawn(asked, left_out)]
    values = [lineage.measure(state) for state in (start, recorded, again, trained(left_out))]
    means = [torch.stack(draws).mean(0) for draws in zip(*random, strict=True)]
    return Verification(
        stage.name, len(left_out), len(asked.examples), drift,
        tuple(_outcomes(lineage.behaviors, len(asked.errors), [*values, means])),
        (*_caveats(lineage, stage, asked, drift), *notes),
    )  # fmt: skip


def _programs(stage: StageReader, asked: Removed) -> tuple[Callable[[frozenset[int]], Program], tuple[str, ...]]:
    """Places to leave out -> program, and what to know about it."""
    examples, given = asked.examples, asked.program
    if given is not None:
        return lambda out: lambda model: given(model, frozenset(examples.ids[place] for place in out)), ()
    order = RecordedOrder.of(stage, examples)
    said = (
        "the stage was run from the ledger: recorded steps, order and learning rates, the losses of the given examples"
    )
    kept = "the weights of the examples that stay in a batch are as they were, also where others of it are left out"
    return lambda out: lambda model: RecordedSteps(model, order, examples, out), (said, kept, *order.notes)


def _drawn(asked: Removed, left_out: frozenset[int]) -> list[frozenset[int]]:
    """As many random examples that are no suspects; all others, where there are fewer."""
    others = [place for place in range(len(asked.examples)) if place not in left_out]
    draw = np.random.default_rng(asked.seed)
    count = min(len(left_out), len(others))
    return [frozenset(draw.choice(others, count, replace=False).tolist()) for _ in range(asked.draws)]


def _finite(state: TrainingState, stage: StageReader) -> TrainingState:
    if not state.finite:
        raise NotComparableError(
            f"Stage '{stage.name}' diverged when it was run again.",
            cause="the examples, their losses or the program are not those of the recorded training.",
            fix="pass the examples that it was trained on, or a program with the same data and arguments.",
        )
    return state


def _drift(lineage: Lineage, stage: StageReader, again: TrainingState) -> float:
    final = state_of(lineage.model).weights  # a state names the weights that stood elsewhere then
    names = [name for name in stage.meta["trainable"] if name in final]
    missed, changed = (
        _distance({name: state.weights.get(name, final[name]) for name in names}, again.weights)
        for state in (lineage.end(stage), lineage.start(stage))
    )
    return missed / changed if changed else float(missed > 0)


def _distance(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> float:
    squares = [(value.double() - second[name].double()).square().sum() for name, value in first.items()]
    return float(torch.stack(squares).sum().sqrt()) if squares else 0.0


def _outcomes(behaviors: Sequence[Behavior], errors: int, arms: Sequence[Sequence[Tensor]]) -> Iterator[Outcome]:
    for number, behavior in enumerate(behaviors):
        kind = "error" if number < errors else "other"
        for query, values in zip(
            behavior.queries, zip(*(arm[number].tolist() for arm in arms), strict=True), strict=True
        ):
            figures = dict(zip(COLUMNS, values, strict=True))
            yield Outcome(kind, behavior.name, query, unit=behavior.unit, **figures)


def _mean(rows: Sequence[Outcome]) -> Outcome:
    figures = {name: float(np.mean([getattr(row, name) for row in rows])) for name in COLUMNS}
    return Outcome(rows[0].kind, rows[0].behavior, str(len(rows)), unit=rows[0].unit, **figures)


def _caveats(lineage: Lineage, stage: StageReader, asked: Removed, drift: float) -> list[str]:
    said = f"run again with all examples, the stage ends beside the recorded weights by {drift:.1%} of what it changed"
    if drift == 0.0:
        said = "run again with all examples, the stage ends at the recorded weights, bit for bit"
    if drift > DRIFTED:
        said += (
            ": another training of the same kind (dropout draws anew, or data and losses differ), so compare with it"
        )
    found = [said]
    if asked.draws == 1:
        found.append("one random set of examples is the control: its spread is not known (draws=...)")
    if later := [other.name for other in lineage.later(stage)]:
        found.append(f"all figures are of the end of '{stage.name}': later stages {later} were not run again")
    if _drops_out(lineage.model):
        found.append("the model drops out: trainings differ by what was drawn too, not by the examples alone")
    return found


def _drops_out(model: nn.Module) -> bool:
    return any(isinstance(module, nn.Dropout) and module.p > 0 for module in model.modules())
