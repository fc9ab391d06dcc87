"""What a pass for rows costs beside the closest peer's, each over a plain pass forward and backward.

A GPT-2 of 4 layers and width 256, 64 examples of 128 tokens in batches of 8, rows of 16 x 16 numbers per layer, raw.
CPU time of the process; passes and plain ones take turns. The peer leaves out the head, the embeddings and all biases,
so ours runs on its layers too. The bound is that of a pass that forms no weight's gradient: two of the three matrix
products of each layer.
"""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import json
import subprocess
from pathlib import Path
from typing import Any

import report
import torch
from overhead_work import RANK, small_gpt2
from pass_work import Pass, batches, plain, ratios, tokens
from torch import nn

from trainer_attrib import Examples, SketchConfig
from trainer_attrib.analysis.gradient_rows import GradientRows
from trainer_attrib.tap.plan import plan_sketch
from trainer_attrib.tap.projections import Projections

HERE = Path(__file__).parent
OURS = {
    "trainer-attrib": SketchConfig(rank=RANK),
    "trainer-attrib, peer's layers": SketchConfig(rank=RANK, modules="transformer.h.*"),
}
BOUND = 2 / 3


def our_pass(model: nn.Module, sketch: SketchConfig) -> tuple[Pass, int]:
    """The pass, and the numbers of a row."""
    plan = plan_sketch(model, sketch)
    projections = Projections(plan, model, None, 1)
    texts = [" ".join(map(str, ids)) for ids in tokens()]
    examples = Examples.of_texts(texts, lambda text: {"input_ids": [int(word) for word in text.split()]})

    def rows() -> None:
        with GradientRows(model, projections).opened() as opened:
            for batch in batches():
                opened.of_losses(examples, batch)

    return rows, plan.width


def peer_figures(python: Path, rounds: int) -> dict[str, Any] | None:
    """The peer's rows, measured by its own Python; None, with a message, where it is not there."""
    if not python.exists():
        print("peer skipped: not installed, see benchmarks/README.md")
        return None
    command = [str(python), str(HERE / "peer_pass.py"), str(rounds)]
    ran = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": str(HERE)}, capture_output=True, text=True, check=False
    )
    if ran.returncode:
        raise SystemExit(f"peer_pass.py: {ran.stderr[-2000:]}")
    return json.loads(ran.stdout.splitlines()[-1])


def main() -> None:
    options = report.parser_with_peer((__doc__ or "").splitlines()[0]).parse_args()
    torch.set_num_threads(1)
    rounds = options.seeds or (5 if options.quick else 25)
    peer = peer_figures(options.peer_python, rounds)
    model = small_gpt2().eval()
    passes = {name: our_pass(model, sketch) for name, sketch in OURS.items()}
    rows = [
        row | {"bound": BOUND if row["pass"] in OURS else 1.0, "numbers per row": passes.get(row["pass"], (None, 0))[1]}
        for row in ratios([(plain(model), {name: work for name, (work, _) in passes.items()})], rounds)
    ]
    checks = {}
    if peer is not None:
        again, theirs = (row | {"bound": bound} for row, bound in zip(peer["rows"], (1.0, BOUND), strict=True))
        rows += [
            again | {"pass": "plain again, peer's environment", "numbers per row": 0},
            theirs | {"pass": f"bergson {peer['version']}", "numbers per row": peer["numbers"]},
        ]
        ours = next(row for row in rows if row["pass"] == "trainer-attrib, peer's layers")
        checks["ratio over the peer's, its layers"] = report.check(ours["ratio"] / theirs["ratio"], 1.0)
    report.publish("pass_cost_peer", rows, checks, quick=options.quick)


if __name__ == "__main__":
    main()
