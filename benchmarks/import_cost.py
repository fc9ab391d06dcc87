"""What importing costs over `import torch`: CPU time of both, told apart inside one new process, then the next.

The packages that recording may load beside torch are pinned by `tests/test_architecture.py`; measured are user and
system time of the import statements alone, files in the page cache. One process gives both terms of a difference: how
long torch takes to load varies more from process to process than what is measured. The least of all rounds, since
noise only adds.

The closest peer is measured in its own environment, in turns with ours, over torch and transformers, and over
transformers' Trainer too: whoever trains has loaded that already, whoever asks has not. The bound of all is nothing.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import report

TORCH, TRANSFORMERS = "import torch", "import torch, transformers"
TRAINER = f"{TRANSFORMERS}; transformers.Trainer"
IMPORTS = {
    "import trainer_attrib": "import trainer_attrib",
    "... and its Recorder": "trainer_attrib.Recorder",
    "... and its Analyzer": "trainer_attrib.Analyzer",
}
BESIDE = {
    "callback": "from trainer_attrib.integrations.huggingface import AttributionCallback",
    "callback, recorder and analyzer": "import trainer_attrib; trainer_attrib.Recorder; trainer_attrib.Analyzer",
}
PEER = {"peer (bergson)": "import bergson; from bergson.huggingface import GradientCollectorCallback"}
TARGET = 0.5  # seconds over `import torch`
FAR_OFF = 0.5  # of `import torch`: what fails a quick run, on any machine


def cpu_seconds(python: str | Path, first: str, then: Mapping[str, str]) -> dict[str, float]:
    """CPU time of the first statement and, after it, up to the end of every other one, in a new process."""
    lines = ["import json, time", "times = {}", "began = time.process_time()", first, "ended = time.process_time()"]
    for name, statement in then.items():
        lines += [statement, f"times[{name!r}] = time.process_time() - ended"]
    lines.append("print(json.dumps({'first': ended - began} | times))")
    process = subprocess.run([str(python), "-c", "\n".join(lines)], capture_output=True, text=True, check=True)
    return json.loads(process.stdout.splitlines()[-1])


def measured(first: str, asked: Mapping[str | Path, Mapping[str, str]], rounds: int) -> list[dict[str, Any]]:
    """A line for each statement, the least of all rounds, in which the Pythons take turns."""
    for python, then in asked.items():
        cpu_seconds(python, first, then)  # fills the page cache, writes the bytecode
    taken = [{python: cpu_seconds(python, first, then) for python, then in asked.items()} for _ in range(rounds)]
    return [
        {
            "statement": name,
            "over": first,
            "seconds": min(found[python][name] for found in taken),
            "of that": min(found[python][name] / found[python]["first"] for found in taken),
        }
        for python, then in asked.items()
        for name in then
    ]


def main() -> None:
    chosen = report.parser_with_peer((__doc__ or "").splitlines()[0]).parse_args()
    rounds = chosen.seeds or (5 if chosen.quick else 20)
    rows = measured(TORCH, {sys.executable: IMPORTS}, rounds)
    checks = {"import_seconds_over_torch": report.check(rows[-1]["seconds"], TARGET)}
    far_off = rows[-1]["of that"] > FAR_OFF
    if chosen.peer_python.exists():
        for name, first in (("transformers", TRANSFORMERS), ("the Trainer", TRAINER)):
            *ours, peer = measured(first, {sys.executable: BESIDE, chosen.peer_python: PEER}, max(1, rounds // 4))
            rows += [*ours, peer]
            for row in ours:
                over = report.check(row["seconds"] / peer["seconds"], 1.0)
                checks[f"over {name}, {row['statement']}, seconds over the peer's"] = over
    else:
        print("peer skipped: not installed, see benchmarks/README.md")
    report.publish("import_cost", rows, checks, quick=chosen.quick)
    if chosen.quick and far_off:
        raise SystemExit("importing the package costs half of torch again: something heavy is loaded too early")


if __name__ == "__main__":
    main()
