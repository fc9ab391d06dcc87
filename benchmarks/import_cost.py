"""What importing costs: CPU time of `import torch` with and without recorder and analyzer, in new processes in turn.

The packages that recording may load beside torch are pinned by `tests/test_architecture.py`; measured are user and
system time of the import statements alone, files in the page cache, the least of all rounds, since noise only adds.
"""

from __future__ import annotations

import subprocess
import sys

import report

IMPORTS = {
    "import torch": "import torch",
    "import trainer_attrib": "import torch, trainer_attrib",
    "... and its Recorder": "import torch, trainer_attrib; trainer_attrib.Recorder",
    "... and its Analyzer": "import torch, trainer_attrib; trainer_attrib.Recorder; trainer_attrib.Analyzer",
}
TARGET = 0.5  # seconds over `import torch`
FAR_OFF = 1.5  # times `import torch`: what fails a quick run, on any machine


def cpu_seconds(statement: str) -> float:
    """CPU time of a statement in a new process."""
    code = f"import time; began = time.process_time(); {statement}; print(time.process_time() - began)"
    return float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)


def main() -> None:
    chosen = report.parser((__doc__ or "").splitlines()[0]).parse_args()
    for statement in IMPORTS.values():  # fills the page cache, writes the bytecode
        cpu_seconds(statement)
    rounds = [
        {name: cpu_seconds(statement) for name, statement in IMPORTS.items()}
        for _ in range(chosen.seeds or (3 if chosen.quick else 15))
    ]
    least = {name: min(found[name] for found in rounds) for name in IMPORTS}
    torch = least["import torch"]
    rows = [
        {"statement": name, "seconds over torch": seconds - torch, "times torch": seconds / torch}
        for name, seconds in least.items()
    ]
    checks = {"import_seconds_over_torch": report.check(rows[-1]["seconds over torch"], TARGET)}
    report.publish("import_cost", rows, checks, notes=[f"import torch itself: {torch:.2f} s"], quick=chosen.quick)
    if chosen.quick and rows[-1]["times torch"] > FAR_OFF:
        raise SystemExit("importing the package costs half of torch again: something heavy is loaded too early")


if __name__ == "__main__":
    main()
