"""What importing costs over `import torch`: CPU time of both, told apart inside one new process, then the next.

The packages that recording may load beside torch are pinned by `tests/test_architecture.py`; measured are user and
system time of the import statements alone, files in the page cache. One process gives both terms of a difference: how
long torch takes to load varies more from process to process than what is measured. The least of all rounds, since
noise only adds.
"""

from __future__ import annotations

import json
import subprocess
import sys

import report

IMPORTS = {
    "import trainer_attrib": "import trainer_attrib",
    "... and its Recorder": "trainer_attrib.Recorder",
    "... and its Analyzer": "trainer_attrib.Analyzer",
}
TARGET = 0.5  # seconds over `import torch`
FAR_OFF = 0.5  # of `import torch`: what fails a quick run, on any machine


def cpu_seconds() -> dict[str, float]:
    """CPU time of `import torch` and, after it, up to the end of every other statement, in a new process."""
    lines = ["import json, time", "times = {}", "began = time.process_time()", "import torch"]
    lines.append("ended = time.process_time()")
    for name, statement in IMPORTS.items():
        lines += [statement, f"times[{name!r}] = time.process_time() - ended"]
    lines.append("print(json.dumps({'import torch': ended - began} | times))")
    process = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, check=True)
    return json.loads(process.stdout)


def main() -> None:
    chosen = report.parser((__doc__ or "").splitlines()[0]).parse_args()
    cpu_seconds()  # fills the page cache, writes the bytecode
    rounds = [cpu_seconds() for _ in range(chosen.seeds or (5 if chosen.quick else 20))]
    torch = min(found["import torch"] for found in rounds)
    rows = [
        {
            "statement": name,
            "seconds over torch": min(found[name] for found in rounds),
            "of torch": min(found[name] / found["import torch"] for found in rounds),
        }
        for name in IMPORTS
    ]
    checks = {"import_seconds_over_torch": report.check(rows[-1]["seconds over torch"], TARGET)}
    report.publish("import_cost", rows, checks, notes=[f"import torch itself: {torch:.2f} s"], quick=chosen.quick)
    if chosen.quick and rows[-1]["of torch"] > FAR_OFF:
        raise SystemExit("importing the package costs half of torch again: something heavy is loaded too early")


if __name__ == "__main__":
    main()
