"""What is supported: runs the tests marked ``support`` and writes docs/support.md from their outcomes.

    python benchmarks/support.py                            all areas
    python benchmarks/support.py Optimizers "Many processes"   these; rows of the others stay as the last run left them
    python benchmarks/support.py --list                     rewrites the page after a change of the untested list

Each row is verified, refused with a message, or not tested, with the reason: tests/support.py says how a row is made.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import report

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from tests.support import AREAS, untested  # noqa: E402

PAGE = ROOT / "docs" / "support.md"
RESULTS = report.RESULTS / "support.json"
_INTRODUCTION = """\
# What is supported

Written by `benchmarks/support.py` from the outcomes of the tests; do not edit. **Verified**: every test named passed.
**Refused**: training is stopped before its first step, or the part is left out, with a message that says why.
**Not tested**: nobody has shown that it works, and why not. There is no fourth state.
"""


def main() -> int:
    """Returns the exit code: 1 if a marked test failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("areas", nargs="*", metavar="AREA", help=f"of {', '.join(AREAS)}; all without one")
    parser.add_argument("--quick", action="store_true", help="write nothing")
    parser.add_argument("--list", action="store_true", help="run no test")
    arguments = parser.parse_args()
    if unknown := set(arguments.areas) - set(AREAS):
        parser.error(f"no area {', '.join(unknown)}")
    areas = [] if arguments.list else arguments.areas or list(AREAS)
    kept = json.loads(RESULTS.read_text())["rows"] if RESULTS.exists() else []
    found, code = run(areas) if areas else ([], 0)
    rows = ordered([row for row in kept if row["tests"] and row["area"] not in areas] + found)
    failed = [row["reason"] for row in rows if row["reason"].endswith(" failed")]
    held = {"marked_tests_failed": report.check(len(failed), 0)}
    report.publish("support", rows, held, quick=arguments.quick)
    if not arguments.quick:
        PAGE.write_text(page(rows))
    return code


def run(areas: list[str]) -> tuple[list[dict[str, Any]], int]:
    """Rows of the marked tests of these areas, and pytest's exit code."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.json"
        options = [f"--support={','.join(areas)}", f"--support-json={file}", "-p", "no:cacheprovider"]
        done = subprocess.run([sys.executable, "-m", "pytest", "tests", *options], cwd=ROOT, check=False)
        if done.returncode > 1:
            raise SystemExit("pytest broke off: nothing is written")
        return json.loads(file.read_text()), done.returncode


def ordered(tested: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows with a test and rows without, by area, then by name."""
    without = [
        {"area": area, "combination": combination, "state": "not tested", "reason": why, "tests": []}
        for (area, combination), why in untested().items()
    ]
    return sorted(tested + without, key=lambda row: (AREAS.index(row["area"]), row["combination"].lower()))


def page(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = [_INTRODUCTION]
    for area in AREAS:
        lines += [f"## {area}", "", "| combination | state | shown by |", "|---|---|---|"]
        for row in (row for row in rows if row["area"] == area):
            state = f"{row['state']}: {row['reason']}" if row["reason"] else f"**{row['state']}**"
            tests = ", ".join(f"`{test.removeprefix('tests/').replace('::', ': ')}`" for test in row["tests"])
            lines.append(f"| {row['combination']} | {state} | {tests} |".replace("|  |", "| |"))
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
