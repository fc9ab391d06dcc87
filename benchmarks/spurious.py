"""Which of four stages taught the shortcut, and can it be taken out again? Two pipelines, image and text, on real data.

Stages are named by their effects on targeted behaviors. Then two remedies: what the stage did to the weights is taken
out of the final ones, as far as held-out groups profit; or the examples responsible are dropped and the stage and what
came after it are trained again. Beside them: without the stage, and the stage with its shortcut at random.
Accuracy is on balanced groups; `as trained on` weights them as in the shortcut stage, where the shortcut helps.
"""

from __future__ import annotations

import gc
import logging
import os
from statistics import mean
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import report
import torch
from spurious_runs.arms import BALANCED, METHODS, REMEDIES, TRAINED, Found, measured
from spurious_runs.image import image_pipeline
from spurious_runs.pipeline import FOLLOWS, GUILTY, HARM, MISLED, STAGES, WORST
from spurious_runs.text import text_pipeline

from trainer_attrib.analysis.tables import require_matplotlib

PIPELINES = {"image": image_pipeline, "text": text_pipeline}
SHARE = 0.95  # of the shortcut stage's examples that have it
PICTURE = report.RESULTS / "spurious.png"
TARGETED = (FOLLOWS, MISLED)
NOTES = (
    "setting: the strength of the move, or the share of the stage's examples dropped; searched on held-out groups "
    "for the best worst group among those that lose at most 2 points of average accuracy",
    "as trained on: there the shortcut is right, so that taking it out costs accuracy, as balanced training does",
    "dropped examples shorten the stage, which alone weakens the shortcut: see 'as many at random'",
    "the tag in the text pipeline and the digit in the image pipeline were put there; sentences, images and labels "
    "are real",
)


def main() -> None:
    arguments = report.parser(__doc__ or "").parse_args()
    seeds = arguments.seeds or (1 if arguments.quick else 3)
    logging.getLogger("trainer_attrib").setLevel(logging.WARNING)
    torch.set_num_threads(1)
    scale = 0.4 if arguments.quick else 1.0
    found: dict[str, list[Found]] = {name: [] for name in PIPELINES}
    for name, make in PIPELINES.items():
        for seed in range(seeds):
            pipeline = make(seed, SHARE, scale)
            gc.freeze()  # a Trainer collects garbage whenever it begins to train, and this is much to look through
            found[name].append(measured(pipeline))
    rows = [row for name, runs in found.items() for seed, run in enumerate(runs) for row in rows_of(name, seed, run)]
    notes = [note for name, runs in found.items() for note in naming(name, runs)]
    if not arguments.quick:
        draw(found)
    report.publish("spurious", rows, checks(found), quick=arguments.quick, notes=[*notes, *NOTES])


def rows_of(name: str, seed: int, run: Found) -> list[dict[str, Any]]:
    """One per arm."""
    return [
        {
            "pipeline": name,
            "seed": seed,
            "arm": arm.name,
            "accuracy": arm.tested.average,
            "worst group": arm.tested.worst,
            "as trained on": arm.tested.where_aligned(SHARE),
            "gap closed": run.gap_closed(arm.name),
            "setting": arm.setting,
        }
        for arm in run.arms.values()
    ]


def naming(name: str, runs: list[Found]) -> list[str]:
    """Mean effects over the seeds, and how often the right stage is named: the one that did the most harm."""
    said = []
    for behavior in HARM:
        for method in METHODS:
            effects = (f"{s} {mean(run.effects[behavior][method][s] for run in runs):+.2f}" for s in STAGES)
            right = sum(run.named(behavior, method) == GUILTY for run in runs)
            said.append(f"{name}, {behavior}, {method}: {', '.join(effects)}; named in {right} of {len(runs)} seeds")
    told = ", ".join(f"{run.told_apart:.2f}" for run in runs)
    said.append(f"{name}: an example with the shortcut is held more responsible than one without: AUC {told}")
    return said


def checks(found: dict[str, list[Found]]) -> dict[str, Any]:
    """Every figure is that of the seed in which it is worst."""
    held: dict[str, Any] = {}
    for name, runs in found.items():
        asked = [(behavior, method) for behavior in TARGETED for method in METHODS] + [(WORST, "retrain")]
        right = [all(run.named(*how) == GUILTY for how in asked) for run in runs]
        held[f"{name}_stage_named"] = report.check(mean(right), 1.0, most=False)
        held[f"{name}_programs_reproduce_training"] = report.check(mean(run.closed for run in runs), 1.0, most=False)
        gaps = [run.arms[BALANCED].tested.worst - run.arms[TRAINED].tested.worst for run in runs]
        held[f"{name}_shortcut_costs_worst_group"] = report.check(min(gaps), 0.15, most=False)
        for remedy in REMEDIES:
            lost = [run.arms[TRAINED].tested.average - run.arms[remedy].tested.average for run in runs]
            closed = min(run.gap_closed(remedy) for run in runs)
            label = f"{name}_{remedy.replace(' ', '_')}"
            held[f"{label}_closes_gap"] = report.check(closed, 0.5, most=False)
            held[f"{label}_average_lost"] = report.check(max(lost), 0.02)
    return held


def draw(found: dict[str, list[Found]]) -> None:
    """Average against worst-group accuracy of every arm: a faint mark per seed, a full one for their mean."""
    pyplot = require_matplotlib()
    figure, axes = pyplot.subplots(1, len(found), figsize=(10, 4.5), layout="constrained")
    markers = dict(zip(next(iter(found.values()))[0].arms, "XsoD^v", strict=True))
    for axis, (name, runs) in zip(axes, found.items(), strict=True):
        for number, (arm, marker) in enumerate(markers.items()):
            tested = [run.arms[arm].tested for run in runs]
            x, y, color = [t.average for t in tested], [t.worst for t in tested], f"C{number}"
            axis.scatter(x, y, marker=marker, color=color, alpha=0.3, linewidths=0)
            axis.scatter(mean(x), mean(y), marker=marker, color=color, s=90, label=arm)
        trained, balanced = (mean(run.arms[arm].tested.worst for run in runs) for arm in (TRAINED, BALANCED))
        axis.axhline((trained + balanced) / 2, color="grey", linewidth=0.8, linestyle="--", label="half of the gap")
        axis.axvline(mean(run.arms[TRAINED].tested.average for run in runs) - 0.02, color="grey", linewidth=0.8)
        axis.set(title=name, xlabel="average accuracy of the groups", ylabel="accuracy of the worst group")
    axes[-1].legend(loc="lower right", fontsize="small")
    PICTURE.parent.mkdir(exist_ok=True)
    figure.savefig(PICTURE, dpi=110)


if __name__ == "__main__":
    main()
