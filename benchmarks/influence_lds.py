"""How well scores of training examples predict retraining without half of them: every method on the same models.

Linear datamodeling score (Park et al. 2023, "TRAK"): a subset's predicted behavior is the sum of its examples' scores;
Spearman's correlation over subsets with what models really trained on them do, mean over queries. Trainings, truths and
adapters are in ``lds_runs``. Peers run by Pythons of their own on the same weights and data (benchmarks/README.md).

    PYTHONPATH=benchmarks python benchmarks/influence_lds.py --cache FOLDER --peers traker=/path/to/bin/python
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
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
import report
import torch
from lds_runs import peers
from lds_runs.chargpt_model import WARMUP
from lds_runs.contenders import DEFAULT, EARLY_TWO, ENSEMBLE, RANDOM, SHORT, SHORT_TWO, TESTBEDS, TFIDF, Testbed
from lds_runs.testbed import PEER, Scored, Truth

from trainer_attrib.evaluation.agreement import Agreement, agreement
from trainer_attrib.evaluation.datamodeling import datamodeling_score
from trainer_attrib.evaluation.estimates import mean_of

CEILING = "ceiling"
COLUMNS = ("testbed", "kind", "method", "default", "models", "LDS", "±", "subsets", "of ceiling", "x training")
QUICK_HALVES = 20
BARS = {"digits sgdm": (0.67, 0.72), "digits adamw": (0.62, 0.70)}  # the best tuned peer; exact damped Gauss-Newton
THREE_MODELS, LANGUAGE_MODEL, CHEAP = 0.74, 0.44, 0.6
COMPARED = (DEFAULT, SHORT, EARLY_TWO, SHORT_TWO)
SHARE = 0.65  # of the ceiling: 0.44 was measured where the ceiling was 0.68
NOTES = (
    "LDS: ± standard error over queries; `subsets`: standard error from having drawn these subsets, which all methods "
    "share. ceiling: what the mean of the retrainings' repetitions correlates with itself, beyond which nothing counts",
    "x training: CPU time over that of one plain training in the same process, one thread; the trainings of further "
    "models, and recording, are not in it",
    "recorded rows: of the training itself, rank 16 on each side of a weight; no data and no pass over it are needed",
)


def main() -> None:
    arguments = report.parser((__doc__ or "").splitlines()[0])
    arguments.add_argument("--testbeds", default=None, help="globs of names, separated by commas")
    arguments.add_argument("--cache", type=Path, default=None, help="folder where trainings and retrainings are kept")
    arguments.add_argument("--peers", nargs="*", default=[], metavar="NAME=PYTHON", help=f"of {', '.join(peers.PEERS)}")
    options = arguments.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("trainer_attrib").setLevel(logging.WARNING)
    gc.freeze()
    pythons = peers.chosen(options.peers)
    with tempfile.TemporaryDirectory() as temporary:
        rows, notes = measured(options, pythons, options.cache or Path(temporary))
    complete = not options.quick and options.testbeds is None
    if options.quick:
        assert_sound(rows)
    report.publish("influence_lds", rows, checks_of(rows), quick=not complete, notes=[*NOTES, *notes])


def measured(
    options: argparse.Namespace, pythons: dict[str, Path], cache: Path
) -> tuple[list[dict[str, Any]], list[str]]:
    """Rows of every method on every testbed, and what has to be said about them."""
    patterns = options.testbeds or ("digits sgdm" if options.quick else "*")
    rows, notes = [], []
    for testbed in TESTBEDS:
        if not any(fnmatch(testbed.name, pattern.strip()) for pattern in patterns.split(",")):
            continue
        truth = testbed.truth(cache, QUICK_HALVES if options.quick else None)
        found, per_query, failures = [], [], []
        for scored in _everything(testbed, pythons, cache):
            if scored.scores is None:
                failures.append(f"{testbed.name}: {scored.name} failed: {scored.failed}")
            else:
                score = datamodeling_score(scored.scores, truth.masks, truth.values)
                found.append(row_of(testbed.name, scored, score))
                per_query.append(score.per_query)
                print(f"  {testbed.name}: {scored.name} {found[-1]['LDS']:.3f} x{scored.ratio:.2f}", flush=True)
        rows += [ceiling_of(testbed.name, truth), *sorted(found, key=lambda row: (row["kind"], -row["LDS"]))]
        notes += [f"{testbed.name}: recording takes {testbed.recording():.2f} of a plain training"]
        notes += [*beside_the_best_peer(found, per_query), *failures]
    return rows, notes


def _everything(testbed: Testbed, pythons: dict[str, Path], cache: Path) -> Iterator[Scored]:
    yield from testbed.ours(cache)
    weights = testbed.weights(cache) if pythons else []
    for peer, python in pythons.items():
        began = time.monotonic()
        yield from peers.peer_scores(peer, python, testbed.trained(0, cache), testbed.kind, weights)
        print(f"  {testbed.name}: {peer} took {time.monotonic() - began:.0f} s", flush=True)


def row_of(testbed: str, scored: Scored, score: Agreement) -> dict[str, Any]:
    """Of one method."""
    estimate, share = score.mean, score.mean.value / (score.ceiling or float("nan"))
    found = (estimate.value, estimate.standard_error, score.subset_error, share, scored.ratio)
    named = (testbed, scored.kind, scored.name, scored.default, scored.models)
    return dict(zip(COLUMNS, (*named, *found), strict=True))


def beside_the_best_peer(rows: list[dict[str, Any]], per_query: list[np.ndarray]) -> list[str]:
    """How far one testbed's rows of ours with a bar are from its best peer, over the same queries [Q]."""
    peers_here = [pair for pair in zip(rows, per_query, strict=True) if pair[0]["kind"] == PEER]
    if not peers_here:
        return []
    best, theirs = max(peers_here, key=lambda pair: pair[0]["LDS"])
    return [
        f"{row['testbed']}: {row['method']} minus {best['method']}: {mean_of(own - theirs)}, paired by query"
        for row, own in zip(rows, per_query, strict=True)
        if row["method"] in COMPARED
    ]


def ceiling_of(testbed: str, truth: Truth) -> dict[str, Any]:
    """How well the retrainings agree with each other."""
    ceiling = agreement(truth.values.mean(1), truth.values).ceiling
    repeats = f"{CEILING}: {len(truth.masks)} halves, {truth.values.shape[1]} trainings of each"
    nothing = {"default": True, "models": 0, "±": None, "subsets": None, "x training": None}
    row = {"testbed": testbed, "kind": CEILING, "method": repeats, "LDS": ceiling, "of ceiling": 1.0, **nothing}
    return {column: row[column] for column in COLUMNS}


def checks_of(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The bars, and every peer in the same run."""
    by_name = {(row["testbed"], row["method"]): row for row in rows}
    checks = {}
    for testbed, (bar, stretch) in BARS.items():
        if (testbed, DEFAULT) not in by_name:
            continue
        found, three = by_name[testbed, DEFAULT]["LDS"], by_name[testbed, ENSEMBLE]["LDS"]
        checks[f"{testbed}: {DEFAULT}"] = report.check(found, bar, most=False)
        checks[f"{testbed}: {DEFAULT}, stretch"] = report.check(found, stretch, most=False)
        checks[f"{testbed}: {ENSEMBLE}"] = report.check(three, THREE_MODELS, most=False)
        checks |= _above_peers(rows, testbed, DEFAULT)
    for testbed in (name for name in WARMUP if (name, SHORT) in by_name):
        one = by_name[testbed, SHORT]
        for name in (SHORT, EARLY_TWO, SHORT_TWO):
            checks[f"{testbed}: {name}"] = report.check(by_name[testbed, name]["LDS"], LANGUAGE_MODEL, most=False)
        checks[f"{testbed}: {SHORT}, of ceiling"] = report.check(one["of ceiling"], SHARE, most=False)
        for name in (SHORT, EARLY_TWO):
            checks[f"{testbed}: {name}, x training"] = report.check(by_name[testbed, name]["x training"], CHEAP)
        checks[f"{testbed}: {SHORT} minus {TFIDF}"] = _positive(one["LDS"] - by_name[testbed, TFIDF]["LDS"])
        checks |= _above_peers(rows, testbed, SHORT)
    return checks


def assert_sound(rows: list[dict[str, Any]]) -> None:
    """What must hold even with few retrainings."""
    found = {row["method"]: row["LDS"] for row in rows}
    assert found[DEFAULT] > found["gauss_newton, end only"] - 0.02 > found["grad_dot, recorded rows"], found
    assert abs(found[RANDOM]) < 0.2, found


def _above_peers(rows: list[dict[str, Any]], testbed: str, ours: str) -> dict[str, Any]:
    here = {row["method"]: row for row in rows if row["testbed"] == testbed}
    others = [row for row in here.values() if row["kind"] == PEER]
    if not others:
        return {}
    best = max(others, key=lambda row: row["LDS"])
    return {f"{testbed}: {ours} minus {best['method']}": _positive(here[ours]["LDS"] - best["LDS"])}


def _positive(difference: float) -> dict[str, Any]:
    return report.check(difference, 0.0, most=False)


if __name__ == "__main__":
    main()
