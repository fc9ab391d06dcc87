"""The tables of a stage: what its manifests list, put together over parts and processes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from trainer_attrib.errors import CorruptPartError
from trainer_attrib.ledger.ranks import merge_steps
from trainer_attrib.ledger.schema import EXAMPLES, ROWS, STEPS, check_format, check_names, part_files
from trainer_attrib.ledger.stored import StageTensors
from trainer_attrib.ledger.tables import corrupt, read_table

_SCHEMAS = {"rows": ROWS, "steps": STEPS, "examples": EXAMPLES}


class StageTables(StageTensors):
    """Steps and examples of one stage, and where its parts are. Only sealed parts are seen."""

    def parts(self) -> list[dict[str, Any]]:
        """Manifest entries of all sealed parts of all ranks, each with ``until``: the last step of it that counts.

        Where a stage was resumed from a checkpoint, steps after the checkpoint that the earlier attempt had recorded
        never became part of the model; they stay on disk and are left out by every reader.
        """
        found = []
        for name in self._manifests():
            manifest = self._storage.read_json(f"{self._folder}/{name}")
            check_format(manifest, self._storage.path(f"{self._folder}/{name}"))
            check_names((n for part in manifest["parts"] for n in part["files"]), self._storage.path(name))
            for index, part in enumerate(manifest["parts"]):
                limits = [r["after_step"] for r in self.meta["resumed"] if index < r["parts"].get(name, 0)]
                found.append({**part, "until": min(limits, default=None)})
        return found

    def part_counts(self) -> dict[str, int]:
        """Number of sealed parts in each manifest."""
        return {name: len(self._storage.read_json(f"{self._folder}/{name}")["parts"]) for name in self._manifests()}

    def _manifests(self) -> list[str]:
        names = self._storage.names(self._folder)
        return [name for name in names if name.startswith("manifest-") and name.endswith(".json")]

    def steps(self, columns: Sequence[str] | None = None) -> pa.Table:
        """All executed optimizer steps, in order; only some columns, where what the others hold is large."""
        found = self._steps(skipped=False, columns=columns)
        return found if columns is None else found.select(list(columns))

    def steps_by_rank(self) -> dict[int, int]:
        """How many executed steps each process told of; of one that was killed, those that it had sealed."""
        steps = self._all("steps", STEPS)
        told = zip(steps["rank"].to_pylist(), steps["skipped"].to_pylist(), strict=True)
        return dict(Counter(rank or 0 for rank, skipped in told if not skipped))

    def skipped_steps(self) -> pa.Table:
        """Steps that a gradient scaler skipped, in order; ``step`` counts the steps executed before each. One that was
        skipped after the checkpoint that a run resumed from, before any was executed, is listed by both attempts."""
        return self._steps(skipped=True)

    def _steps(self, *, skipped: bool, columns: Sequence[str] | None = None) -> pa.Table:
        several = self.meta["processes"] > 1
        needed = None if columns is None or several else {*columns, "step", "skipped"}
        steps = self._all("steps", STEPS, needed)
        steps = steps.filter(pa.array([bool(found) is skipped for found in steps["skipped"].to_pylist()], pa.bool_()))
        return merge_steps(steps, sharded=self.meta["sharded"]) if several else steps.sort_by("step")

    def examples(self, columns: Sequence[str] = ("example", "source", "text")) -> pa.Table:
        """Every example seen in this stage once; its text may be left out."""
        examples = self._all("examples", EXAMPLES, columns).select(list(columns))
        return examples if self.meta["processes"] == 1 else _once(examples)

    def example_parts(self) -> list[Any]:
        """Where examples are told of, for :meth:`examples_of`."""
        return self.parts()

    def examples_of(self, ids: frozenset[str] | None, part: Any) -> pa.Table:
        """Example, source and text of some examples, of those that one part tells of; None: of all of them."""
        return some_of(self._kind(part, "examples"), ids)

    def sources(self) -> dict[str, str | None]:
        """The data source of every example."""
        told = self.examples(("example", "source"))
        return dict(zip(told["example"].to_pylist(), told["source"].to_pylist(), strict=True))

    def _all(self, kind: str, schema: pa.Schema, columns: Collection[str] | None = None) -> pa.Table:
        """Of all parts; some columns, or those of them that an earlier version wrote."""
        tables = []
        for part in self.parts():
            table = self._kind(part, kind, columns)
            if part["until"] is not None and "step" in table.column_names:
                table = table.take(np.flatnonzero(table["step"].to_numpy() <= part["until"]))
            tables.append(table)
        return pa.concat_tables(tables) if tables else schema.empty_table()

    def _kind(self, part: dict[str, Any], kind: str, columns: Collection[str] | None = None) -> pa.Table:
        return self._table(part, part_files(part, kind, 1)[0], columns)

    def _table(self, part: dict[str, Any], name: str, columns: Collection[str] | None = None) -> pa.Table:
        kind = name.partition("/")[0]
        rows = None if kind == "steps" else part[kind]  # which counts executed ones only
        entry = part["files"][name]
        return read_table(self._storage, f"{self._folder}/{name}", entry, _SCHEMAS[kind], rows, columns)

    def _check_length(self, part: dict[str, Any], name: str) -> None:
        size, sealed = self._storage.size(f"{self._folder}/{name}"), part["files"][name]["bytes"]
        if size != sealed:
            raise self._corrupt(name, f"it has {size} bytes, {sealed} were sealed")

    def _corrupt(self, name: str, why: str) -> CorruptPartError:
        return corrupt(self._storage, f"{self._folder}/{name}", why)


def some_of(examples: pa.Table, ids: frozenset[str] | None) -> pa.Table:
    """The rows of some examples; None: of all."""
    if ids is None:
        return examples
    return examples.filter(pa.array([example in ids for example in examples["example"].to_pylist()], pa.bool_()))


def _once(examples: pa.Table) -> pa.Table:
    """Without those that several processes have seen."""
    first = np.unique(examples["example"].to_numpy(zero_copy_only=False), return_index=True)[1]
    return examples.take(np.sort(first))
