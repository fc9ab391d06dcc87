"""The comparable rows of a stage, part by part: whoever reads a part, the same rows come out of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Generic, TypeVar

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from trainer_attrib.analysis.retrieval.tally import Tally
from trainer_attrib.analysis.retrieval.where import Where
from trainer_attrib.errors import CorruptPartError
from trainer_attrib.execution.runner import Runner, Serial
from trainer_attrib.ledger.reader import RowBlock, RowPart, StageReader
from trainer_attrib.numerics.sketching import unit_rows
from trainer_attrib.progress import progress

Answer = TypeVar("Answer")

_COMPARED = ("example", "step", "norm", "denominator", "version", "complete")  # half of a row's columns
CHUNK_BYTES = 8 << 20  # of float32 rows at a time: what a cache holds is multiplied before it leaves it
ROWS = 4096  # of small parts that have one answer, which costs as much for few rows; more parts are more memory


@dataclass(frozen=True)
class Rows:
    """Some rows of one second-moment version.

    Args:
        unit: unit-norm sketches [N, K], float32.
        norms: of the examples' loss gradients, [N].
        version: of the second moments.
        measure: of how far the rows moved the weights, see ``reach``.
    """

    unit: Tensor
    norms: Tensor
    version: int
    measure: Callable[[], Tensor]

    @property
    def reach(self) -> Tensor:
        """How far a unit of each example's gradient moved the weights: learning rate over loss denominator, [N]. The
        learning rates are read when somebody asks."""
        return self.measure()


class Part:
    """Rows of one part of the ledger that have the same second-moment version.

    Args:
        place: in the ledger.
        block: that they are in.
        at: where in it.
        version: of the second moments.
        rates: gives the learning rates by step number.
        keep: 1 for the columns that are compared, [K].
    """

    def __init__(
        self,
        place: RowPart,
        block: RowBlock,
        at: np.ndarray,
        version: int,
        rates: Callable[[], np.ndarray],
        keep: Tensor,
    ) -> None:
        whole = len(at) == block.table.num_rows
        self.table = block.table if whole else block.table.take(at)
        self._sketches = block.sketches if whole else block.sketches.take(at)
        self.place, self.version, self._rates, self._keep = place, version, rates, None if keep.all() else keep
        self._norms_N = torch.from_numpy(np.array(self.table["norm"].to_numpy(), dtype=np.float32))

    def rows(self) -> Iterator[Rows]:
        """Read the sketches, a few megabytes at a time: a whole part as float32 would go through memory twice. They are
        valid until the next are asked for, which are written over them.

        torch converts float16 with the processor's instructions for it, numpy value by value: 17 times slower.
        """
        step = max(64, CHUNK_BYTES // (4 * max(1, self._sketches.shape[1])))
        room_NK = torch.empty(min(step, len(self._norms_N)), self._sketches.shape[1])  # taken once: pages are costly
        for number, chunk in enumerate(self._sketches.chunks(step)):
            span = slice(number * step, (number + 1) * step)
            unit_NK, norms_N = torch.from_numpy(chunk), self._norms_N[span]
            if unit_NK.dtype != torch.float32:
                unit_NK = room_NK[: len(chunk)].copy_(unit_NK)
            if self._keep is not None:
                unit_NK, kept_N = unit_rows(unit_NK * self._keep)
                norms_N = norms_N * kept_N
            yield Rows(unit_NK, norms_N, self.version, partial(self._reach, span))

    def _reach(self, span: slice) -> Tensor:
        steps_N, rates = self.table["step"].to_numpy()[span], self._rates()
        if len(steps_N) and steps_N.max() >= len(rates):
            raise CorruptPartError(
                f"There are rows of step {steps_N.max()}, and the last step told of is {len(rates) - 1}.",
                cause="a part of the steps was lost, or a file was changed by hand.",
                fix="run `trainer-attrib verify` for the whole list, then restore what it names.",
            )
        return torch.from_numpy(np.array(rates[steps_N] / self.table["denominator"].to_numpy()[span], np.float32))


def places_of(parts: Sequence[Part]) -> list[RowPart]:
    """Where some parts are in the ledger, each place once: rows of several versions may share one."""
    return list({id(part.place): part.place for part in parts}.values())


class ByVersion:
    """What depends on the second moments that scale rows, made once for each version.

    Args:
        make: version -> its value.
    """

    def __init__(self, make: Callable[[int], Tensor]) -> None:
        self._make, self._made = make, dict[int, Tensor]()

    def __call__(self, version: int) -> Tensor:
        """Of one version."""
        if version not in self._made:
            self._made[version] = self._make(version)
        return self._made[version]


@dataclass
class Comparable:
    """Which rows of a stage are compared.

    Args:
        reader: of the stage.
        keep: 1 for the columns that are compared, [K].
        scale_free: whether raw rows, from before the stage's first second moments, can be compared with the others.
        where: conditions that rows must meet.
    """

    reader: StageReader
    keep: Tensor
    scale_free: bool
    where: Where | None = None

    def of(self, part: RowPart) -> tuple[list[Part], Tally]:
        """Those of one part of the ledger, by version; their sketches are not read yet."""
        block, tally = self.reader.row_block(part, _COMPARED), Tally()
        versions, complete = block.table["version"].to_numpy(), block.table["complete"].to_numpy()
        wanted = np.ones(len(versions), bool) if self._passes is None else self._passes(block.table)
        tally.skip("some layers did not fire", int((wanted & ~complete).sum()))
        finite = np.isfinite(block.table["norm"].to_numpy())
        tally.skip("their gradients were NaN or infinite", int((wanted & complete & ~finite).sum()))
        return list(self._by_version(part, block, versions, complete & finite & wanted, tally)), tally

    def _by_version(
        self, place: RowPart, block: RowBlock, versions: np.ndarray, chosen: np.ndarray, tally: Tally
    ) -> Iterator[Part]:
        for version in np.unique(versions[chosen]):
            at = np.flatnonzero((versions == version) & chosen)
            raw = version == 0 and bool(self.reader.meta["versions"])
            if raw and not self.scale_free:
                tally.skip("raw rows from before the first second-moment version", len(at))
                continue
            tally.raw += raw * len(at)
            yield Part(place, block, at, int(version), lambda: self._rates, self.keep)

    @cached_property
    def sources(self) -> dict[str, str | None]:
        """The data source of every example."""
        return self.reader.sources()

    @cached_property
    def _rates(self) -> np.ndarray:
        return _rates(self.reader)

    @cached_property
    def _passes(self) -> Callable[[pa.Table], np.ndarray] | None:
        return None if self.where is None else self.where.of_stage(lambda: self.sources)


@dataclass(frozen=True)
class _OnParts(Generic[Answer]):
    """What a process does with the parts that it is given."""

    rows: Comparable
    work: Callable[[Comparable, Sequence[Part], int], Answer]

    def __call__(self, task: tuple[int, Sequence[RowPart]]) -> tuple[Answer, Tally]:
        number, places = task
        parts, tally = list[Part](), Tally()
        for place in places:
            found, counted = self.rows.of(place)
            parts += found
            tally.add(counted)
        return self.work(self.rows, parts, number), tally


@dataclass
class StreamedStage:
    """The comparable rows of a stage, read in order, by this process or by several; see :class:`Comparable`."""

    reader: StageReader
    keep: Tensor
    scale_free: bool
    runner: Runner = field(default_factory=Serial)
    tally: Tally = field(default_factory=Tally)  # of the last stream

    def map(
        self,
        work: Callable[[Comparable, Sequence[Part], int], Answer],
        title: str,
        where: Where | None = None,
        *,
        large: bool = False,
    ) -> Iterator[Answer]:
        """Answers about the parts of the ledger, in order. Of a long ledger several small ones have one answer: how
        many depends on the ledger alone, as sums must.

        Args:
            work: of the rows, those of some parts, which may be none, and the answer's number. It may run elsewhere.
            title: for the progress bar.
            where: conditions that rows must meet.
            large: answers are about as large as parts, so that up to 16 parts of a long ledger have one answer.
        """
        self.tally, parts = Tally(), self.parts
        if large:
            size = max(1, min(16, len(parts) // 64))
        else:
            rows = sum(part.entry["rows"] for part in parts)
            size = max(1, min(ROWS * len(parts) // max(1, rows), len(parts) // 8))
        tasks = [(number, parts[first : first + size]) for number, first in enumerate(range(0, len(parts), size))]
        asked = _OnParts(self._compared(where), work)
        for answer, tally in progress(self.runner.map(asked, tasks), f"{title} {self.reader.name}", len(tasks)):
            self.tally.add(tally)
            yield answer

    @cached_property
    def parts(self) -> list[RowPart]:
        """Where its rows are: those that were there when it was first asked, for more may come. One process looks."""
        return self.runner.once(self.reader.row_parts)

    def _compared(self, where: Where | None) -> Comparable:
        return Comparable(self.reader, self.keep, self.scale_free, where)

    def stream(self, title: str, where: Where | None = None) -> Iterator[tuple[pa.Table, Rows]]:
        """Rows of one version, a few at a time, with their table; read here."""
        self.tally = Tally()
        rows = self._compared(where)
        for place in progress(self.parts, f"{title} {self.reader.name}"):
            parts, tally = rows.of(place)
            self.tally.add(tally)
            for part in parts:
                at = 0
                for chunk in part.rows():
                    yield part.table.slice(at, len(chunk.norms)), chunk
                    at += len(chunk.norms)


def _rates(stage: StageReader) -> np.ndarray:
    """Learning rate of every step, mean over the parameter groups, by step number; for SGD what momentum makes of it
    in the end."""
    steps = stage.steps(("step", "learning_rate", "beta1")).to_pylist()
    sgd = any(optimizer["class"].endswith(".SGD") for optimizer in stage.meta["optimizers"])
    rates = np.zeros(1 + max((row["step"] for row in steps), default=0))
    for row in steps:
        momenta = row["beta1"] if sgd else [0.0] * len(row["learning_rate"])
        pairs = zip(row["learning_rate"], momenta, strict=True)
        rates[row["step"]] = np.mean([rate / (1 - min(momentum or 0.0, 0.999)) for rate, momentum in pairs])
    return rates
