"""Rows of given examples at recorded snapshots: one pass over the data for each, stored, resumable."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from trainer_attrib.analysis.effects.lineage import Lineage
from trainer_attrib.analysis.examples import Examples
from trainer_attrib.analysis.gradient_rows import GradientRows
from trainer_attrib.analysis.query_sketches import missing_weights
from trainer_attrib.analysis.training_state import standing
from trainer_attrib.errors import ConfigurationError
from trainer_attrib.ledger.passes import PassFiles
from trainer_attrib.ledger.reader import StageReader
from trainer_attrib.ledger.schema import EXAMPLES, ROWS
from trainer_attrib.numerics.sketching import unit_rows
from trainer_attrib.progress import Bar, progress
from trainer_attrib.tap.plan import SketchPlan
from trainer_attrib.tap.projections import Projections

PART_BYTES = 32 << 20  # of sketches in a part: what is lost at most where a pass breaks off


@dataclass(frozen=True)
class Snapshots:
    """Rows of given examples at recorded states of the model, instead of those that training left.

    Args:
        names: of the snapshots, one row for each example at each.
    """

    names: tuple[str, ...] = ("end",)


@dataclass(frozen=True)
class Pass:
    """A finished pass: rows of so many examples, of ``bytes_per_example`` each."""

    stage: str
    snapshot: str
    examples: int
    bytes_per_example: int


def sketch(view: Lineage, stage: StageReader, examples: Examples, snapshot: str) -> Pass:
    """Make the pass of a stage's examples at a snapshot, or what is left of it; nothing where it is finished.

    Raises:
        ConfigurationError: it was begun over other examples.
        StageNotFoundError: no such snapshot.
        NotComparableError: weights of the snapshot are not known, or none of the rows' weights is in the model.
    """
    files, dtype = PassFiles(stage, snapshot), stage.meta["sketch"]["dtype"]
    version = _version(stage, stage.snapshot_step(snapshot))
    runner = view.runner
    runner.once(lambda: files.begin(_fingerprint(examples), version, dtype, _described(examples)))
    order = [position for batch in examples.batches() for position in batch][files.rows :]
    kept = max(1, PART_BYTES // (4 * stage.width) // examples.batch_size) * examples.batch_size
    shares = [order[first : first + kept] for first in range(0, len(order), kept)]
    made = runner.map(_RowsOf(view, stage, snapshot, version, examples), shares)
    for table, unit_NK in progress(made, f"parts of {stage.name}", len(shares)):
        runner.once(lambda: files.add(table, unit_NK))  # noqa: B023  it is called at once
    return Pass(stage.name, snapshot, files.rows, stage.codec(dtype).record.itemsize)


@dataclass(frozen=True)
class _RowsOf:
    """Makes the rows of some examples at a snapshot: positions -> their table, unit-norm rows [N, width]."""

    view: Lineage
    stage: StageReader
    snapshot: str
    version: int
    examples: Examples

    def __call__(self, positions: Sequence[int]) -> tuple[pa.Table, np.ndarray]:
        view, stage, examples = self.view, self.stage, self.examples
        whole = SketchPlan.from_dict(stage.meta["plan"])
        plan = whole.of_weights({weight.name for weight in whole.weights} - {*missing_weights(view.model, stage)})
        held = [weight for weight in whole.weights if weight.name in {part.name for part in plan.weights}]
        spans = [(weight.span, part.span) for weight, part in zip(held, plan.weights, strict=True)]
        sketches = torch.zeros(len(positions), whole.width)
        with standing(view.model, view.inside(stage, self.snapshot)):
            projections = Projections(plan, view.model, stage.factors(self.version), self.version)
            with (
                GradientRows(view.model, projections).opened() as rows,
                Bar(f"rows of {stage.name}", len(positions)) as bar,
            ):
                for at in range(0, len(positions), examples.batch_size):
                    batch = positions[at : at + examples.batch_size]
                    found = rows.of_losses(examples, batch).float().cpu()
                    for theirs, ours in spans:
                        sketches[at : at + len(batch), theirs] = found[:, ours]
                    bar.update(len(batch))
        unit_NK, norms_N = unit_rows(whole.pool(sketches))
        step = stage.snapshot_step(self.snapshot)
        return _table(examples, positions, norms_N, self.version, step), unit_NK.numpy()


def _table(examples: Examples, positions: Sequence[int], norms_N: Tensor, version: int, step: int) -> pa.Table:
    same = {
        "step": max(1, step),  # the learning rate of a start is that of its first step
        "rank": 0, "micro_batch": 0, "epoch": None, "tokens": None,
        "denominator": 1.0, "denominator_source": "pass", "version": version, "complete": True,
    }  # fmt: skip
    rows = [
        {"example": str(examples.ids[position]), "row": row, "norm": norm, **same}
        for row, (position, norm) in enumerate(zip(positions, norms_N.tolist(), strict=True))
    ]
    return pa.Table.from_pylist(rows, ROWS)


def _version(stage: StageReader, step: int) -> int:
    """The second moments that scaled the rows of training around the step; the first ones for what was before them."""
    versions = stage.meta["versions"]
    before = [entry["version"] for entry in versions if entry["after_step"] <= step]
    return max(before, default=1) if versions else 0


def _described(examples: Examples) -> pa.Table:
    columns = zip(examples.ids, examples.sources, examples.texts, strict=True)
    rows = [{"example": str(i), "source": source, "text": text} for i, source, text in columns]
    return pa.Table.from_pylist(rows, EXAMPLES)


def _fingerprint(examples: Examples) -> str:
    """Of ids, texts and items in the order of the pass, which does not depend on the size of batches."""
    found = hashlib.blake2b(digest_size=16)
    for position in (position for batch in examples.batches() for position in batch):
        for part in (examples.ids[position], examples.texts[position], examples.dataset[position]):
            _feed(found, part)
    return found.hexdigest()


def _feed(found: Any, part: Any) -> None:
    if isinstance(part, Tensor):
        part = part.detach().cpu().contiguous()
        found.update(f"{part.dtype}{tuple(part.shape)}".encode())
        found.update(part.reshape(-1).view(torch.uint8).numpy().tobytes())
    elif isinstance(part, Mapping):
        for key in part:
            _feed(found, key)
            _feed(found, part[key])
    elif isinstance(part, (list, tuple)):
        found.update(f"[{len(part)}".encode())
        for inner in part:
            _feed(found, inner)
    elif hasattr(part, "__dataclass_fields__"):
        _feed(found, vars(part))
    elif part is None or isinstance(part, (str, bytes, int, float, bool, np.ndarray)):
        found.update(part.tobytes() if isinstance(part, np.ndarray) else f"{type(part).__name__}:{part!r};".encode())


def source_of(source: str | Snapshots) -> Snapshots | None:
    """Where rows come from; None for those of training.

    Raises:
        ConfigurationError: there is no source of this name.
    """
    if isinstance(source, Snapshots):
        return source
    if source not in ("training", "snapshot"):
        raise ConfigurationError(
            f"Unknown source {source!r}.", fix="use 'training', 'snapshot', or Snapshots(('mid-1', 'end'))."
        )
    return Snapshots() if source == "snapshot" else None
