"""Kills recording, sealing, resuming, passes over data and retraining at random moments, and looks at what is left.

    python -m tests.faults.kill_trials --trials 200

Every ledger must open; every acknowledged row (in a part that a manifest lists) must be there once, equal to the bit to
that of a run that nothing killed; what was killed must go on to its end and leave nothing lying about. Work runs in
forked processes, so that torch is imported once. Exits with 1 if anything is wrong.
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
from collections import Counter
from pathlib import Path

from tests.faults.trials import PHASES, Trials

COLUMNS = ("trials", "opened", "lost", "corrupt", "doubled")


def run_trials(count: int, seed: int, place: Path, *, tell: bool = False) -> dict[str, Counter[str]]:
    """Phase -> sums of what its trials found; phases take turns.

    Args:
        count: of trials, over all phases.
        seed: of the moments at which work is killed.
        place: an empty folder.
        tell: print every trial.
    """
    trials, table = Trials(place, seed), {phase: Counter[str]() for phase in PHASES}
    for number in range(count):
        phase = list(PHASES)[number % len(PHASES)]
        trials.moments.clear()
        try:
            found = PHASES[phase](trials)
        except RuntimeError as failed:
            found = {"failed": 1}
            print(f"trial {number}, {phase}: {failed}", file=sys.stderr)
        table[phase].update({"trials": 1, **found})
        if tell or not _sound(table[phase]):
            print(f"trial {number:3}  {phase:12} killed at {', '.join(trials.moments)}: {found}", file=sys.stderr)
    return table


def _sound(found: Counter[str]) -> bool:
    return found["opened"] == found["trials"] and not any(found[name] for name in ("lost", "corrupt", "doubled"))


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quiet", action="store_true", help="print trials only where something is wrong")
    options = parser.parse_args()
    logging.disable(logging.WARNING)  # what broke off says so at each resume
    with tempfile.TemporaryDirectory() as place:
        table = run_trials(options.trials, options.seed, Path(place), tell=not options.quiet)
    print(f"seed {options.seed}")
    print(f"{'phase':14}" + "".join(f"{name:>9}" for name in COLUMNS))
    for phase, found in [*table.items(), ("all", sum(table.values(), Counter[str]()))]:
        print(f"{phase:14}" + "".join(f"{found[name]:9}" for name in COLUMNS))
    return 0 if all(_sound(found) for found in table.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
