"""What shadows cost: the `Trainer` runs of capture_overhead.py with a shadow of the stage before, taking turns.

A stage is recorded, then its model is trained on: plain, recorded, and recorded with a shadow of several kinds. `step`
is the step's CPU time over the plain run's, `for the shadow` what it takes more than the recorded run's, and `bound`
the passes that it cannot do without: 2 / (thin * every) of the step's. The rest is the optimizer's step of each
replica, and that two passes over few examples take longer than their share of one over many.
"""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import tempfile
from pathlib import Path
from typing import Any

import report
from overhead_work import StepClock, ratios, take_turns, trainer_for

from trainer_attrib import Shadow
from trainer_attrib.integrations.huggingface import AttributionCallback

SHADOWS = {
    "thin=4": Shadow("first", thin=4),
    "thin=4, 2 replicas": Shadow("first", thin=4, replicas=2),
    "thin=8": Shadow("first", thin=8),
}


def measure(steps: int, folder: Path) -> list[dict[str, Any]]:
    """The table."""
    runs, trained = ["plain", "recorded", *SHADOWS], {}

    def first(clock: StepClock) -> Any:
        made = trainer_for(clock, AttributionCallback(folder / "ledger", stage="first"), 4, folder)
        trained.update(made.model.state_dict())
        return made

    def later(clock: StepClock) -> Any:
        shadow = [SHADOWS[clock.run]] if clock.run in SHADOWS else []
        stage = f"run-{runs.index(clock.run)}"
        callback = AttributionCallback(folder / "ledger", stage=stage, shadow=shadow, strict=True)
        made = trainer_for(clock, None if clock.run == "plain" else callback, steps, folder)
        made.model.load_state_dict(trained)
        return made

    take_turns(["first"], first)
    rows = list(ratios(take_turns(runs, later)))
    for row in rows:
        shadow = SHADOWS.get(row["run"])
        row["for the shadow"] = row["step"] - rows[0]["step"]
        row["bound"] = 2 / (shadow.thin * shadow.every) if shadow else 0.0
    return rows


def main() -> None:
    chosen = report.parser((__doc__ or "").splitlines()[0]).parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        rows = measure(chosen.seeds or (16 if chosen.quick else 60), Path(temporary))
    checks = {
        f"shadow_overhead_over_bound, {row['run']}": report.check(row["for the shadow"] / row["bound"], 1.5)
        for row in rows
        if row["bound"]
    }
    report.publish("shadow_overhead", rows, checks, quick=chosen.quick)


if __name__ == "__main__":
    main()
