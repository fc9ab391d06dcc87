"""Which training text taught the answer? Lexical search, gradients and TrackStar's ingredients, by two yardsticks.

MRR and Recall@10 ask whether a text that states the answer is ranked first. Tail-patch asks whether a top text moves
the answer: mean change of the answer's log-probability, nats, by one optimizer step on each of a query's top 10 texts
alone (mean learning rate of the training over the batch size, which is an example's share of a step; second moments of
its end). Standard errors are over the queries of all seeds. Data and models: ``fact_runs``. Seed 0 is left out: on it
TrackStar's estimators were compared.
"""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Collection
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import report
import torch
from fact_runs.case import CASES, trained
from fact_runs.rankings import (
    BM25,
    CORRECTED,
    DOT,
    KEYWORDS,
    MIXED,
    RAW_R,
    RECIPES,
    TFIDF,
    TRAIN,
    UNIT,
    K,
    patched,
    rankings,
)
from fact_runs.training import quiet

from trainer_attrib.evaluation.estimates import mean_of
from trainer_attrib.evaluation.retrieval import fact_tracing
from trainer_attrib.evaluation.tail_patch import RANDOM

FACTS = "country facts"
RANKINGS = (BM25, TFIDF, KEYWORDS, *RECIPES, RANDOM)
Figures = dict[str, dict[str, np.ndarray]]  # ranking -> figure -> one value per query


def main() -> None:
    arguments = report.parser((__doc__ or "").splitlines()[0])
    arguments.add_argument("--jobs", type=int, default=1, help="trainings at once")
    arguments.add_argument(
        "--cache", type=Path, default=None, help="folder where figures of measured rankings are kept"
    )
    arguments.add_argument("--cases", default=None, help=f"some of {sorted(CASES)}, separated by commas")
    options = arguments.parse_args()
    names = options.cases.split(",") if options.cases else [FACTS] if options.quick else list(CASES)
    seeds = range(1, 1 + (options.seeds or (1 if options.quick else 3)))
    work = [(name, seed, options.quick, options.cache) for name in names for seed in seeds if seed <= CASES[name].seeds]
    if options.jobs == 1:
        done = [measured(*one) for one in work]
    else:
        with ProcessPoolExecutor(options.jobs, multiprocessing.get_context("spawn")) as pool:
            done = list(pool.map(measured, *zip(*work, strict=True)))
    found: dict[str, list[Figures]] = {name: [] for name in names}
    for (name, *_), figures in zip(work, done, strict=True):
        found[name].append(figures)
    pooled = {name: pool_of(runs) for name, runs in found.items()}
    rows = [row_of(name, ranking, figures) for name, of in pooled.items() for ranking, figures in of.items()]
    held = {f"{name}: {label}": figure for name, of in pooled.items() for label, figure in checks(of).items()}
    notes = [f"{name}: {len(runs)} seeds of {len(runs[0][RANDOM]['MRR'])} queries" for name, runs in found.items()]
    notes += [f"{name}: not run" for name in CASES if name not in names]
    report.publish("fact_tracing", rows, held, quick=options.quick or options.cases is not None, notes=notes)
    if options.quick:
        assert pooled[FACTS][MIXED]["MRR"].mean() > 2 * pooled[FACTS][RANDOM]["MRR"].mean(), "no better than chance"


def measured(name: str, seed: int, quick: bool, cache: Path | None) -> Figures:
    """Train, rank, patch, for the rankings of which that was not done before."""
    kept = cache / f"{name}-{seed}.json" if cache else None
    known = json.loads(kept.read_text()) if kept and kept.exists() else {}
    figures: Figures = {r: {f: np.array(v) for f, v in of.items()} for r, of in known.items()}
    if figures.keys() >= {*RECIPES, RANDOM}:
        return figures
    figures |= _measured(name, seed, quick, figures.keys())
    figures = {ranking: figures[ranking] for ranking in RANKINGS if ranking in figures}
    if kept:
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps({r: {f: v.tolist() for f, v in of.items()} for r, of in figures.items()}))
    return figures


def _measured(name: str, seed: int, quick: bool, known: Collection[str]) -> Figures:
    torch.set_num_threads(1)
    quiet()
    gc.freeze()  # a Trainer collects garbage whenever it begins to train
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="fact-tracing-") as folder:
        run = trained(CASES[name].make(seed, quick), seed, Path(folder))
        said = float(run.behavior.values(run.model).mean())
        compared = rankings(run, known)
        patch = patched(run, compared)
    compared[RANDOM] = np.random.default_rng(seed).random(run.case.relevant.shape)
    print(f"{name}, seed {seed}: {time.monotonic() - began:.0f} s, answers at {said:.2f} nats", flush=True)
    figures: Figures = {}
    for ranking, scores in compared.items():
        top = fact_tracing(scores, run.case.relevant, (K,))
        ten = np.array([fact_tracing(scores[q : q + 1], run.case.relevant[q : q + 1], (K,)).recall[K].value
                        for q in range(len(scores))])  # fmt: skip
        figures[ranking] = {"MRR": top.reciprocal_ranks, "Recall@10": ten, "tail-patch": patch.alone[ranking].mean(1)}
    return figures


def pool_of(runs: list[Figures]) -> Figures:
    """The queries of all seeds side by side."""
    return {
        ranking: {name: np.concatenate([run[ranking][name] for run in runs]) for name in figures}
        for ranking, figures in runs[0].items()
    }


def row_of(name: str, ranking: str, figures: dict[str, np.ndarray]) -> dict[str, Any]:
    """One line of the table."""
    row: dict[str, Any] = {"data": name, "ranking": ranking}
    for figure, values in figures.items():
        found = mean_of(values)
        row |= {figure: round(found.value, 4), f"{figure} ±": round(found.standard_error, 4)}
    return row


def checks(of: Figures) -> dict[str, Any]:
    """Gains of one ingredient after the other, query by query, and tail-patch beside BM25's."""
    gains = {
        "MRR gained by unit norm": (UNIT, DOT),
        "MRR gained by correction": (CORRECTED, UNIT),
        "MRR gained by R_train": (TRAIN, CORRECTED),
        "MRR gained by R_task in the mix": (MIXED, TRAIN),
        "MRR gained by correction where there is R": (MIXED, RAW_R),
    }
    held = {
        label: report.check(float((of[a]["MRR"] - of[b]["MRR"]).mean()), 0.0, most=False)
        for label, (a, b) in gains.items()
    }
    for other in (BM25, UNIT):
        beyond = float((of[MIXED]["tail-patch"] - of[other]["tail-patch"]).mean())
        held[f"tail-patch beyond {other}"] = report.check(beyond, 0.0, most=False)
    return held


if __name__ == "__main__":
    main()
