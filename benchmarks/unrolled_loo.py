"""How well influence tells what leaving out one example does: unrolled training against real leave-one-out.

A perceptron on 1000 digits (``lds_runs``), with SGD and AdamW, smooth (GELU) and with kinks (ReLU). The truth of
"one out" are 1000 retrainings on the same batches from the same weights, each with another example's loss times 0; of
"5 % out" 40, each without 50 examples at random; of "half out" 100 halves, five trainings of each from other weights on
other batches. Spearman's correlation over the examples (subsets), mean over queries and seeds, and its standard error;
cost is CPU time over that of one training, and the first truth costs 1001.

    PYTHONPATH=benchmarks python benchmarks/unrolled_loo.py --cache FOLDER
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import logging
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import report
import torch
from lds_runs import digits, digits_model, digits_truth
from lds_runs.testbed import STAGE, Trained

from trainer_attrib import Analyzer, Examples, Influence
from trainer_attrib.analysis.loops import Loop
from trainer_attrib.capture.messages import logger
from trainer_attrib.evaluation.adapters import scores_of
from trainer_attrib.evaluation.correlation import spearman

CONFIGS = {"sgdm_gelu": "SGD, GELU", "adamw_gelu": "AdamW, GELU", "sgdm": "SGD, ReLU", "adamw": "AdamW, ReLU"}
UNROLLED, RANDOM = "unrolled", "random"
METHODS = (UNROLLED, "gauss_newton", "directional", "grad_dot", RANDOM)
LEAST = {"sgdm_gelu": 0.95, "adamw_gelu": 0.88}
"""Of the correlation with leaving out one example."""


def main() -> None:
    arguments = report.parser((__doc__ or "").splitlines()[0])
    arguments.add_argument("--cache", type=Path, default=None, help="folder where trainings are kept")
    options = arguments.parse_args()
    torch.set_num_threads(1)
    logger.setLevel(logging.WARNING)
    with tempfile.TemporaryDirectory() as temporary:
        cache, seeds = options.cache or Path(temporary), options.seeds or (1 if options.quick else 3)
        configs = ["sgdm_gelu"] if options.quick else list(CONFIGS)
        found = {config: [measured(config, seed, cache) for seed in range(seeds)] for config in configs}
    table = [row(config, method, runs) for config, runs in found.items() for method in METHODS]
    warned = {config: [is_warned(one[UNROLLED]["caveats"]) for one in runs] for config, runs in found.items()}
    notes = [
        f"{100 * seeds} queries: the margin of a test image's class; {digits_model.TRAIN} examples, 600 steps",
        *(f"{CONFIGS[config]}: {runs[0][UNROLLED]['caveats'][0]}" for config, runs in found.items()),
    ]
    report.publish("unrolled_loo", table, checks_of(table, warned), quick=options.quick, notes=notes)
    if options.quick:
        assert_sound(table, warned)


def measured(config: str, seed: int, cache: Path) -> dict[str, dict[str, Any]]:
    """By method: correlations with both truths for each query, cost and caveats."""
    run = digits.trained(config, seed, cache)
    one, many, half = (digits_truth.ground_truth(config, kind, cache, seed=seed) for kind in ("loo", "five", "half"))
    left_out_QN = (one.values[0, 0] - one.values[1:, 0]).T
    training = min(seconds_of(lambda: digits.train_plainly(config, seed))[1] for _ in range(3))
    found = {}
    for method in METHODS:
        (scores_QN, caveats), seconds = seconds_of(lambda method=method: scored(run, method))
        found[method] = {
            "one out": spearman(scores_QN, left_out_QN),
            "5 % out": spearman(scores_QN @ many.masks.T.astype(float), many.values.mean(1).T),
            "half out": spearman(scores_QN @ half.masks.T.astype(float), half.values.mean(1).T),
            "cost": seconds / training,
            "caveats": caveats,
        }
    return found


def scored(run: Trained, method: str) -> tuple[np.ndarray, list[str]]:
    """Scores [Q, N] in the order of the training examples, and what the method says of them."""
    if method == RANDOM:
        return np.random.default_rng(run.seed).normal(size=(len(run.behavior), len(run.ids))), []
    examples = Examples.of_classes(*run.train, ids=run.ids, batch_size=100)
    found: Influence = Analyzer(run.ledger, run.model).influence(
        [run.behavior], recipe=method, data={STAGE: examples}, programs={STAGE: program_of(run)}, controls=()
    )
    return scores_of(found, run.ids), list(found.caveats)


def program_of(run: Trained) -> Callable[[Any], Loop]:
    """The training, to be run again."""
    setup = digits_model.CONFIGS[run.config]
    batches = [tuple(part[rows] for part in run.train) for rows in digits_model.orders(run.seed)]

    def loss(model: Any, batch: Any) -> torch.Tensor:
        return digits_model.losses(model, batch).mean()

    return lambda model: Loop(model, loss, batches, lambda m: setup.optimizer(m.parameters()), len(batches))


def row(config: str, method: str, runs: list[dict[str, dict[str, Any]]]) -> dict[str, Any]:
    """One line of the table, over all seeds."""
    one, many, half = (np.concatenate([run[method][key] for run in runs]) for key in ("one out", "5 % out", "half out"))
    return {
        "training": CONFIGS[config],
        "method": method,
        "one out": float(one.mean()),
        "s.e.": float(one.std(ddof=1) / len(one) ** 0.5),
        "worst query": float(one.min()),
        "5 % out": float(many.mean()),
        "half out": float(half.mean()),
        "cost": float(np.mean([run[method]["cost"] for run in runs])),
        "warned": sum(is_warned(run[method]["caveats"]) for run in runs),
    }


def checks_of(table: list[dict[str, Any]], warned: dict[str, list[bool]]) -> dict[str, Any]:
    """The correlations that must be reached, and where a warning must (not) come."""
    reached = {
        f"{CONFIGS[config]}: unrolled, one out": report.check(
            correlation_of(table, config, UNROLLED), least, most=False
        )
        for config, least in LEAST.items()
        if config in warned
    }
    smooth = [said for config in warned if config in LEAST for said in warned[config]]
    kinked = [said for config in warned if config not in LEAST for said in warned[config]]
    silent = {"trainings with kinks without a warning": report.check(kinked.count(False), 0)} if kinked else {}
    return {**reached, "smooth trainings with a warning": report.check(smooth.count(True), 0), **silent}


def correlation_of(table: list[dict[str, Any]], config: str, method: str) -> float:
    """With leaving out one example."""
    return next(r["one out"] for r in table if r["training"] == CONFIGS[config] and r["method"] == method)


def is_warned(caveats: list[str]) -> bool:
    """Whether scores say that they mean nothing."""
    return any("not smooth enough" in caveat for caveat in caveats)


def seconds_of(work: Callable[[], Any]) -> tuple[Any, float]:
    """What it returns, and its CPU time."""
    began = time.process_time()
    found = work()
    return found, time.process_time() - began


def assert_sound(table: list[dict[str, Any]], warned: dict[str, list[bool]]) -> None:
    """What must hold for every seed."""
    for config, least in LEAST.items():
        if config in warned:
            assert correlation_of(table, config, UNROLLED) >= least, f"unrolled misses its bar: {table}"
            assert abs(correlation_of(table, config, RANDOM)) < 0.05, f"the control is not random: {table}"
            assert not any(warned[config]), f"a warning without need: {warned}"


if __name__ == "__main__":
    main()
