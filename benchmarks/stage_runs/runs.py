"""One training of four stages at one regime and seed: recorded, retrained without each stage, kept on disk."""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from stage_runs import charlm, digits
from stage_runs.regimes import Pipeline, Regime
from trainer_attrib import Analyzer, Ledger
from trainer_attrib.analysis.effects.estimate import Method
from trainer_attrib.analysis.effects.replay import Replay
from trainer_attrib.analysis.effects.retrain import Retrain
from trainer_attrib.tap.names import parameters_by_name

PIPELINES: dict[str, type[Any]] = {"classifier": digits.Digits, "language model": charlm.CharacterModel}
TRUTH, NOISE = "truth", "noise floor"
ORDERS = (1, 2)  # fresh orders of the later stages' data
_DECIDING = ("regimes.py", "digits.py", "texts.py", "charlm.py")  # what they say decides what is trained

Row = dict[str, Any]
"""regime, seed, stage, method, behavior, query, effect, bar, cost (a share of the later steps), order."""


@dataclass(frozen=True)
class Run:
    """A trained regime and the effects of its stages on all queries, as retraining tells them.

    Args:
        truth: rows of the truth and of the noise floor.
        exact: whether running all stages again gives the recorded weights, bit for bit.
    """

    regime: Regime
    seed: int
    pipeline: Pipeline
    analyzer: Analyzer
    truth: list[Row]
    exact: bool

    def effects(self, name: str, method: Method, order: int = 0) -> list[Row]:
        """Rows of one method for all stages but the last, whose effect is known exactly."""
        programs = self.pipeline.programs(order=order)
        found = self.analyzer.stage_effects(self.pipeline.behaviors(), method, programs)
        later = {stage: sum(self.regime.steps[n + 1 :]) for n, stage in enumerate(self.pipeline.stages)}
        return [
            {
                "regime": self.regime.name, "seed": self.seed, "stage": row.stage, "method": name, "rung": row.method,
                "behavior": row.behavior, "query": row.query, "effect": row.effect, "bar": row.error_bar,
                "cost": row.cost / later[row.stage], "order": order,
            }
            for row in found.rows
            if later[row.stage]
        ]  # fmt: skip


def run(regime: Regime, seed: int, cache: Path) -> Run:
    """Train and retrain, or read what was trained before by the same code."""
    folder = cache / f"{regime.name.replace(' ', '-')}-{seed}-{_digest(regime)}"
    pipeline = PIPELINES[regime.pipeline](regime, seed)
    if not (folder / "truth.parquet").exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        _train(pipeline, folder / "ledger")
    analyzer = Analyzer(folder / "ledger", _trained(pipeline, folder / "ledger"))
    if not (folder / "truth.parquet").exists():
        fresh = Run(regime, seed, pipeline, analyzer, [], analyzer.closure(pipeline.programs()).exact)
        table = pa.Table.from_pylist(list(_truths(fresh)))
        pq.write_table(table.replace_schema_metadata({"exact": str(int(fresh.exact))}), folder / "truth.parquet")
    table = pq.read_table(folder / "truth.parquet")
    return Run(regime, seed, pipeline, analyzer, table.to_pylist(), table.schema.metadata[b"exact"] == b"1")


def timed(name: str, began: float) -> None:
    """What was done, to look at while waiting."""
    print(f"  {time.monotonic() - began:6.1f} s  {name}", flush=True)


def _truths(run: Run) -> Iterator[Row]:
    """Retraining, and differences of whole retrainings with and without the stage on other orders of the data."""
    yield from run.effects(TRUTH, Retrain())
    for order in ORDERS:
        yield from run.effects(NOISE, Replay(merge=1, thin=1, read_out="diff"), order)


def _train(pipeline: Pipeline, ledger: Path) -> None:
    model = pipeline.model()
    for program in pipeline.programs(ledger).values():
        program(model).train()


def _trained(pipeline: Pipeline, ledger: Path) -> torch.nn.Module:
    model, end = pipeline.model(), Ledger(ledger).stage(pipeline.stages[-1]).snapshot("end")
    with torch.no_grad():
        for name, parameter in parameters_by_name(model).items():
            parameter.copy_(end[name])
    return model


def _digest(regime: Regime) -> str:
    sources = [(Path(__file__).parent / name).read_text() for name in _DECIDING]
    return hashlib.blake2b("\0".join([repr(regime), *sources]).encode(), digest_size=5).hexdigest()
