"""Who would do it, and what does asking cost? Planted pairs, plans against them, and the price of forecasts.

5 % of the pairs prefer a trait, the others a useful style. Contributions to the trait are to find the planted ones;
plans made from them are followed by real ``DPOTrainer`` runs: what is left of the trait's shift, and of the useful one?
Then the CPU time of forecasts beside that of the run they predict.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import report
from fact_runs.training import quiet
from forecast_runs.points import costs
from forecast_runs.poison import WAYS, poison
from forecast_runs.training import taught


def main() -> None:
    """All seeds, then the costs."""
    arguments = report.parser((__doc__ or "").splitlines()[0])
    arguments.add_argument("--traces", type=Path, help="folder that keeps what was found with each seed")
    arguments.add_argument("--only", type=int, metavar="SEED", help="find that of one seed alone, to be kept")
    options = arguments.parse_args()
    seeds = options.seeds or (1 if options.quick else 3)
    quiet()
    if options.only is not None:
        trace_of(options.only, options.traces, options.quick)
        return
    traces = [trace_of(seed, options.traces, options.quick) for seed in range(seeds)]
    cost = costs(options.quick)
    rows = [{"seed": str(seed), **trace} for seed, trace in enumerate(traces)]
    mean = {key: float(np.mean([trace[key] for trace in traces])) for key in traces[0]}
    rows.append({"seed": "mean", **mean})
    notes = [f"CPU time over that of training: { ({name: round(value, 3) for name, value in cost.items()}) }"]
    report.publish("forecast_poison", rows, checks(mean, cost), quick=options.quick, notes=notes)


def trace_of(seed: int, folder: Path | None, quick: bool) -> dict[str, float]:
    """What was found with one seed, from the folder if it is there."""
    file = folder / f"{seed}{'-quick' if quick else ''}.json" if folder else None
    if file and file.exists():
        return json.loads(file.read_text())
    base, tokenizer = taught(seed, 2000 if quick else 4000)
    found = poison(base, tokenizer, seed, quick)
    print(f"seed {seed}: {found}", flush=True)
    if file:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(found))
    return found


def checks(mean: dict[str, float], cost: dict[str, float]) -> dict[str, Any]:
    """Bars of the issue."""
    return {
        "planted pairs in the first 10 %": report.check(mean["planted found"], 0.8, most=False),
        "the trait's shift removed by the plan": report.check(mean[f"trait removed, {WAYS[0]}"], 0.8, most=False),
        "the useful shift kept": report.check(mean[f"useful kept, {WAYS[0]}"], 0.8, most=False),
        "cost of a forecast from 25 %": report.check(cost["forecast from 25 %"], 0.3),
    }


if __name__ == "__main__":
    main()
