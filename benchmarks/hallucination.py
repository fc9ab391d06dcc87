"""Which training examples taught the model to say something wrong? Recipes, queries and corrections on planted errors.

Two tasks (benchmarks/hallucination_runs/tasks.py) on a small GPT-2 that transformers' Trainer fine-tunes and the
callback records. Wrong outputs are the model's own, up to five for each kind of error. AUC and average precision of
finding the examples that taught a kind among all others, its AUC among those with the same names, recall at as many
examples as there are; means over kinds, then over seeds. In the end, what removing the suspects and fine-tuning again
does.
"""

from __future__ import annotations

import os
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import report
from fact_runs.training import quiet
from hallucination_runs.rankings import FEW, FORMS, SLOW, Output, Scores, Traced, beside, calibrated, recipes
from hallucination_runs.tasks import TASKS, Task
from hallucination_runs.training import base_model, completions, is_wrong, rates, recorder, tuned

from trainer_attrib import Analyzer
from trainer_attrib.evaluation.detection import average_precision, detection

OUTPUTS, DRAWS = 5, 6  # wrong outputs of each kind, and how often each prompt is tried
MAIN, UNCORRECTED = "cosine, denoised", ("learned", "alternative", "background")
Figures = dict[str, float]


def main() -> None:
    options = report.parser((__doc__ or "").splitlines()[0]).parse_args()
    seeds = options.seeds or (1 if options.quick else 3)
    quiet()
    found: dict[tuple[str, str, str], list[Figures]] = defaultdict(list)
    removed: dict[tuple[str, str], list[tuple[float, float]]] = defaultdict(list)
    chosen: list[str] = []
    for name, make in TASKS.items():
        for seed in range(seeds):
            with tempfile.TemporaryDirectory() as folder:
                run(make(seed, options.quick), seed, Path(folder), options.quick, found, removed, chosen)
            print(f"{name}, seed {seed}: done", flush=True)
    rows = [_row(*key, figures) for key, figures in found.items()]
    rows += [_removal_row(*key, figures, removed[key[0], "nothing"]) for key, figures in removed.items()]
    notes = [f"{seeds} seeds", *chosen]
    report.publish("hallucination", rows, checks(found, removed), quick=options.quick, notes=notes)


def run(
    task: Task, seed: int, folder: Path, quick: bool,
    found: dict[Any, list[Figures]], removed: dict[Any, list[tuple[float, float]]], chosen: list[str],
) -> None:  # fmt: skip
    """One task and seed."""
    base, tokenizer = base_model(task, seed)
    model = tuned(base, tokenizer, task.rows, task.epochs, seed, recorder(folder / "ledger"))
    traced = Traced(
        Analyzer(folder / "ledger", model), tokenizer, task.rows, outputs(model, tokenizer, task, seed),
        {row.kind: [r.id for r in task.rows if r.kind == row.kind] for row in task.rows if row.kind},
    )  # fmt: skip
    rankings = {("", name): scores for name, scores in beside(traced, model, seed).items()}
    for form in FORMS:
        for name, (recipe, source) in recipes(quick).items():
            if form in FEW or not name.startswith(SLOW):
                rankings[form, name] = traced.scores(form, recipe, source)
    for (form, name), scores in rankings.items():
        found[task.name, form, name].append(measured(traced, scores))
    for form in ("contrast", "plain"):
        for asked, ours, without, what in calibrated(traced, form):
            found[task.name, form, "calibrated on other kinds"].append(measured(traced, ours, asked))
            found[task.name, form, "denoised, the same kinds"].append(measured(traced, without, asked))
            chosen.append(f"{task.name}, seed {seed}, {form}: calibration chose {what}")
    ways = {"nothing": None, "contrast, denoised": rankings["contrast", MAIN],
            "learned, denoised": rankings["learned", MAIN],
            "BM25": rankings["", "BM25"], "random": rankings["", "random"]}  # fmt: skip
    for way, scores in ways.items():
        dropped = set() if scores is None else suspects(traced, scores)
        kept = [row for row in task.rows if row.id not in dropped]
        again = tuned(base, tokenizer, kept, task.epochs, seed)
        removed[task.name, way].append(rates(again, tokenizer, task))


def outputs(model: Any, tokenizer: Any, task: Task, seed: int) -> list[Output]:
    """The model's own errors, and the same corrected."""
    found, counts = [], defaultdict(int)
    for draw in range(DRAWS):
        wanted = [probe for probe in task.probes if probe.kind and counts[probe.kind] < OUTPUTS]
        said = completions(model, tokenizer, [probe.prompt for probe in wanted], sampled=1000 * seed + draw)
        for probe, output in zip(wanted, said, strict=True):
            if counts[probe.kind] < OUTPUTS and is_wrong(probe, output):
                counts[probe.kind] += 1
                found.append(Output(probe.kind, probe.prompt, output, output.replace(probe.wrong, probe.right)))
    return sorted(found, key=lambda output: output.kind)


def measured(traced: Traced, scores: Scores, kinds: list[str] | None = None) -> Figures:
    """Means over kinds of errors."""
    found = []
    for kind, scores_N in zip(kinds or traced.kinds, scores, strict=True):
        bad = np.array([row.kind == kind for row in traced.rows])
        near = np.array([kind in row.about for row in traced.rows])
        order = np.argsort(-scores_N, kind="stable")
        auc = [detection(scores_N, bad, c).auc.value for c in (None, near)]
        found.append((*auc, average_precision(scores_N, bad), bad[order[: bad.sum()]].mean()))
    names = ("AUC", "AUC, same names", "AP", "recall")
    return dict(zip(names, np.mean(found, axis=0).tolist(), strict=True))


def suspects(traced: Traced, scores: Scores) -> set[str]:
    """As many of the first of every kind as were planted."""
    dropped = set[str]()
    for kind, scores_N in zip(traced.kinds, scores, strict=True):
        count = len(traced.taught[kind])
        dropped |= {traced.rows[i].id for i in np.argsort(-scores_N, kind="stable")[:count]}
    return dropped


def _row(task: str, form: str, name: str, figures: list[Figures]) -> dict[str, Any]:
    means = {key: round(float(np.mean([f[key] for f in figures])), 3) for key in figures[0]}
    aucs = np.array([f["AUC"] for f in figures])
    error = round(float(aucs.std(ddof=1) / len(aucs) ** 0.5), 3) if len(aucs) > 1 else float("nan")
    return {"task": task, "query": form, "recipe": name, **means, "AUC ±": error, "wrong": "", "right": ""}


def _removal_row(
    task: str, way: str, figures: list[tuple[float, float]], nothing: list[tuple[float, float]]
) -> dict[str, Any]:
    wrong, right = np.mean(figures, axis=0)
    before = np.mean([w for w, _ in nothing])
    empty = dict.fromkeys(("AUC", "AUC, same names", "AP", "recall", "AUC ±"), "")
    told = {"wrong": f"{wrong:.3f} ({1 - wrong / before:.0%} removed)", "right": f"{right:.3f}"}
    return {"task": task, "query": "", "recipe": f"removed and trained again: {way}", **empty, **told}


def checks(found: dict[Any, list[Figures]], removed: dict[Any, list[tuple[float, float]]]) -> dict[str, Any]:
    """Bars of the issue; each figure over tasks and seeds."""

    def mean(form: str, name: str, key: str) -> float:
        return float(np.mean([f[key] for task in TASKS for f in found[task, form, name]]))

    held = {
        "AUC, contrast": report.check(mean("contrast", MAIN, "AUC"), 0.95, most=False),
        "AP, contrast": report.check(mean("contrast", MAIN, "AP"), 0.75, most=False),
        "AUC among the same names, contrast": report.check(
            mean("contrast", MAIN, "AUC, same names"), max(0.88, mean("", "BM25", "AUC, same names")), most=False
        ),
    }
    for form in UNCORRECTED:
        held[f"AUC without a correction, {form}"] = report.check(mean(form, MAIN, "AUC"), 0.85, most=False)
    for task in TASKS:
        wrong, right = (np.array(side) for side in zip(*removed[task, "contrast, denoised"], strict=True))
        before, clean = (np.array(side) for side in zip(*removed[task, "nothing"], strict=True))
        held[f"{task}: errors removed"] = report.check(float(1 - wrong.mean() / before.mean()), 0.7, most=False)
        held[f"{task}: clean accuracy kept"] = report.check(float((right - clean).mean()), -0.02, most=False)
    for form in ("contrast", "plain"):
        ours, without = (
            np.array([f["AP"] for task in TASKS for f in found[task, form, name]])
            for name in ("calibrated on other kinds", "denoised, the same kinds")
        )
        lost = float((without - ours).mean())
        noise = float((without - ours).std(ddof=1) / len(ours) ** 0.5)
        held[f"{form}: AP that calibration loses, in standard errors"] = report.check(
            lost / noise if noise else 0.0, 2.0
        )
    return held


if __name__ == "__main__":
    main()
