"""How well the effects of training stages are estimated: every method against retraining, in six regimes.

Four stages of a classifier of digits (Lightning, SGD with momentum and AdamW) and of a character language model
(transformers, AdamW), with later learning rates a tenth of the first one's (gentle) or about half of it (standard), as
in the numerical study that the methods come from; data and models in ``stage_runs``. The truth is retraining without
the stage: same batches, same learning rates. Columns are defined in ``stage_runs/scoring.py``. Rows beside the methods:

noise floor   the effect as whole retrainings with and without the stage tell it on other orders of the data
random        the true effects given to other stages and queries

    PYTHONPATH=benchmarks python benchmarks/stage_effects.py --cache FOLDER --methods 'replay*,auto' --raw FILE.parquet
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import argparse
import gc
import logging
import tempfile
import time
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import report
import torch
from stage_runs import charlm, digits, scoring
from stage_runs.contenders import AUTO, EXACT, REPLAY, chosen
from stage_runs.regimes import REGIMES, Regime
from stage_runs.runs import NOISE, TRUTH, run, timed
from stage_runs.targets import checks_of

from trainer_attrib.capture.messages import logger

QUICK_REGIMES, QUICK_METHODS = "AdamW gentle,LM AdamW gentle", f"subtract,{REPLAY},{EXACT},{AUTO}"
RANDOM, ALL = "random", "all"


def main() -> None:
    arguments = report.parser((__doc__ or "").splitlines()[0])
    arguments.add_argument("--methods", default=None, help="globs of names, separated by commas")
    arguments.add_argument("--regimes", default=None, help="globs of names, separated by commas")
    arguments.add_argument("--cache", type=Path, default=None, help="folder where trained regimes are kept")
    arguments.add_argument("--raw", type=Path, default=None, help="Parquet file for every effect, bar and truth")
    options = arguments.parse_args()
    torch.set_num_threads(1)
    digits.quiet()
    charlm.quiet()
    logger.setLevel(logging.WARNING)
    gc.freeze()  # the Trainer collects garbage at every start, each time through all that was imported
    with tempfile.TemporaryDirectory() as temporary:
        rows, exact = measured(options, options.cache or Path(temporary))
    if options.raw:
        pq.write_table(pa.Table.from_pylist(raw(rows)), options.raw)
    table, stages = tabulated(rows)
    checks = checks_of(table, exact)
    complete = not options.quick and options.methods is None and options.regimes is None
    report.publish("stage_effects", table, checks, quick=not complete, notes=notes_of(rows), details={"stages": stages})
    if options.quick:
        assert_sound(table, exact)


def measured(options: argparse.Namespace, cache: Path) -> tuple[list[dict[str, Any]], bool]:
    """Rows of every method at every regime and seed, and whether every training could be run again exactly."""
    patterns = options.regimes or (QUICK_REGIMES if options.quick else "*")
    regimes = [r for r in REGIMES if any(fnmatch(r.name, pattern.strip()) for pattern in patterns.split(","))]
    methods = options.methods or (QUICK_METHODS if options.quick else "*")
    rows, exact = [], True
    for regime in regimes:
        for seed in range(options.seeds or (1 if options.quick else 3)):
            found, same = measured_run(regime.shorter(2) if options.quick else regime, seed, cache, methods)
            rows, exact = rows + found, exact and same
    return rows, exact


def measured_run(regime: Regime, seed: int, cache: Path, methods: str) -> tuple[list[dict[str, Any]], bool]:
    """Truth, noise floor and every method of one training."""
    began = time.monotonic()
    trained = run(regime, seed, cache)
    timed(f"{regime.name}, seed {seed}: trained and retrained", began)
    rows = [*trained.truth, *({**r, "method": RANDOM} for r in scoring.permuted(of(TRUTH, trained.truth)))]
    for name, method in chosen(methods).items():
        began = time.monotonic()
        rows += trained.effects(name, method)
        timed(f"{regime.name}, seed {seed}: {name}", began)
    return rows, trained.exact


def tabulated(rows: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The table, with a row for each method over all regimes, and each stage's scores."""
    table, stages = [], {}
    truth = of(TRUTH, rows)
    methods = [NOISE, *dict.fromkeys(row["method"] for row in rows if row["method"] not in (TRUTH, NOISE))]
    found = {name: scoring.cells(of(name, rows), truth) for name in methods}
    for regime in dict.fromkeys(row["regime"] for row in rows):
        for name, cells in found.items():
            here = [cell for cell in cells if cell.regime == regime]
            table.append(scoring.scored(regime, name, here))
            stages.setdefault(regime, {})[name] = scoring.by_stage(here)
    return [*table, *(scoring.scored(ALL, name, cells) for name, cells in found.items())], stages


def of(method: str, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One method's rows."""
    return [row for row in rows if row["method"] == method]


def raw(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every effect beside its truth."""
    key = ("regime", "seed", "stage", "behavior", "query")
    true = {tuple(row[k] for k in key): row["effect"] for row in of(TRUTH, rows)}
    return [{**row, "truth": true[tuple(row[k] for k in key)]} for row in rows]


def notes_of(rows: list[dict[str, Any]]) -> list[str]:
    """How many queries, and the definitions that a reader needs first."""
    queries = {(row["behavior"], row["query"]) for row in rows if not row["regime"].startswith("LM")}
    texts = {(row["behavior"], row["query"]) for row in rows if row["regime"].startswith("LM")}
    return [
        f"{len(queries)} behaviors of the classifier (loss and margin of each class on clean, patched and rotated "
        f"images), {len(texts)} of the language model (loss and margin of six blocks of each domain)",
        "pearson and spearman: over the queries of a seed, stage and kind, then mean; rel. error: norm of errors over "
        "norm of effects, median over these; top-1 over the first three stages; the last stage is exact and left out",
    ]


def assert_sound(table: list[dict[str, Any]], exact: bool) -> None:
    """What must hold even in a short training."""
    assert exact, "running the stages again does not give the recorded weights"
    for row in table:
        if row["method"] == EXACT:
            assert row["rel. error"] == 0.0, f"a replay of all steps is not retraining: {row}"
        if row["method"] == REPLAY:
            assert row["pearson"] > 0.9, f"replay is far from the truth: {row}"
        if row["method"] == RANDOM:
            assert abs(row["pearson"]) < 0.5, f"the control is not random: {row}"


if __name__ == "__main__":
    main()
