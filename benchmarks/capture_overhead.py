"""What recording costs: whole `Trainer` runs with and without the callback, taking turns step by step.

Trainers train the same 4-layer GPT-2 of width 256 (vocabulary 4096, batch 8 x 128 tokens, float32, one thread,
clipping, fused AdamW): plain, plain once more (the control: its ratio shows the noise), with raw rows, with
AdamW-corrected rows. Each runs in a thread of its own and hands a baton to the next after every optimizer step, so that
adjacent steps are compared and the machine's drift cancels. CPU time is that of the training thread; `with writer` is
that of the whole process meanwhile. All allocate from one heap that keeps what is freed, since page faults fell on some
runs more than on others. Medians over rounds, with a bootstrap standard error; the first are not counted, nor is what a
stage's start and end cost. A quick run above its gate is measured again in four times the steps. The FLOP bound counts
the sketches' matrix products over those of the model's training step, attention included.

Where the closest peer's environment is found (benchmarks/README.md), its callback records the same work right after,
against plain runs of its own; it leaves out the head, the embeddings and all biases, so ours runs on its layers too.
"""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import report
import torch
from overhead_work import LAYERS, RANK, TOKENS, WIDTH, StepClock, ratios, small_gpt2, take_turns, trainer_for

from trainer_attrib import Ledger, SketchConfig
from trainer_attrib.capture.processes import Processes
from trainer_attrib.capture.second_moments import SecondMoments
from trainer_attrib.capture.stage_facts import flop_share
from trainer_attrib.integrations.huggingface import AttributionCallback
from trainer_attrib.tap.names import parameters_by_name
from trainer_attrib.tap.plan import plan_sketch
from trainer_attrib.tap.projections import Projections

HERE = Path(__file__).parent
GATE = 1.25  # of a plain step: what the quick run fails above
SKETCHES = {
    "raw": SketchConfig(rank=RANK, correction="none"),
    "corrected": SketchConfig(rank=RANK),
}
ON_PEER_LAYERS = {
    "raw, peer's layers": SketchConfig(rank=RANK, correction="none", modules="transformer.h.*"),
    "corrected, peer's layers": SketchConfig(rank=RANK, modules="transformer.h.*"),
}


def measure(sketches: dict[str, SketchConfig], steps: int, folder: Path) -> list[dict[str, Any]]:
    """Our rows of the table."""

    def trainer(clock: StepClock) -> Any:
        if clock.run not in sketches:
            return trainer_for(clock, None, steps, folder)
        names = {run: f"run-{number}" for number, run in enumerate(sketches)}
        callback = AttributionCallback(
            folder / "ledger", stage=names[clock.run], sketch=sketches[clock.run], strict=True
        )
        return trainer_for(clock, callback, steps, folder)

    rows = list(ratios(take_turns(["plain", "plain again", *sketches], trainer)))
    ledger = Ledger(str(folder / "ledger"))
    for row in rows:
        row |= {"flop bound": 1.0, "coverage": 0.0, "bytes per example": 0}
    for number, (row, sketch) in enumerate(zip(rows[1:], sketches.values(), strict=True)):
        meta = ledger.stage(f"run-{number}").meta
        row |= {
            "flop bound": flop_bound(sketch),
            "coverage": meta["coverage"]["share"],
            "bytes per example": 2 * meta["width"],
        }
    return rows


def flop_bound(sketch: SketchConfig) -> float:
    """1 + sketch FLOPs over those of all matrix products of the model's training step, attention included."""

    def products(sketch: SketchConfig) -> tuple[float, float]:
        lookups = ("transformer.wpe", "transformer.wte")
        plan = plan_sketch(small_gpt2(), SketchConfig(rank=RANK, modules=sketch.modules, exclude=lookups))
        training = sum(6 * w.rows * w.columns * len(w.modules) for w in plan.weights)
        return flop_share(plan) * training, training

    attention = LAYERS * 3 * 2 * 2 * TOKENS * WIDTH  # scores and values, forward and twice backward, per token
    return 1 + products(sketch)[0] / (products(SketchConfig())[1] + attention)


def correction_memory() -> tuple[int, int]:
    """Bytes held between steps for the correction, and rows plus columns of all weights."""
    model = small_gpt2()
    optimizer = torch.optim.AdamW(model.parameters())
    model(input_ids=torch.zeros(1, 4, dtype=torch.long), labels=torch.zeros(1, 4, dtype=torch.long)).loss.backward()
    optimizer.step()
    plan = plan_sketch(model, SKETCHES["corrected"])
    factors = SecondMoments(plan.weights, optimizer, parameters_by_name(model), "factored", Processes()).factors(1)
    return Projections(plan, model, factors, 1).nbytes, sum(w.rows + w.columns for w in plan.weights)


def peer_figures(python: Path, steps: int) -> dict[str, Any] | None:
    """The peer's rows, coverage and memory, measured by its own Python; None, with a message, where it is not there."""
    if not python.exists():
        print("peer skipped: not installed, see benchmarks/README.md")
        return None
    with tempfile.TemporaryDirectory() as temporary:
        out = Path(temporary) / "peer.json"
        command = [str(python), str(HERE / "peer_overhead.py"), str(out), str(steps)]
        ran = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(HERE)}, capture_output=True, text=True)
        if ran.returncode:
            print(f"peer skipped: {(ran.stderr.strip().splitlines() or ['it failed'])[-1]}, see benchmarks/README.md")
            return None
        return json.loads(out.read_text())


def peer_rows(peer: dict[str, Any]) -> list[dict[str, Any]]:
    """The peer's rows of the table; its bound is that of any two-sided sketch of its layers."""
    bound = {"flop bound": flop_bound(ON_PEER_LAYERS["raw, peer's layers"]), "coverage": peer["coverage"]}
    bound["bytes per example"] = peer["bytes_per_example"]
    nothing = {"flop bound": 1.0, "coverage": 0.0, "bytes per example": 0}
    return [
        row | {"run": f"peer, {row['run']}"} | (nothing if row["run"] == "plain again" else bound)
        for row in peer["rows"]
    ]


def checks_of(rows: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The promises: absolute, against the bound, and against the peer on its own layers."""
    checks = {
        "capture_overhead_raw": report.check(rows["raw"]["step"], 1.04),
        "capture_overhead_corrected": report.check(rows["corrected"]["step"], 1.06),
    }
    for run in SKETCHES:
        over = (rows[run]["step"] - 1) / (rows[run]["flop bound"] - 1)
        checks[f"capture_overhead_{run}_over_flop_bound"] = report.check(over, 3.0)
    for run in SKETCHES:
        if f"peer, {run}" in rows:
            over = (rows[f"{run}, peer's layers"]["step"] - 1) / (rows[f"peer, {run}"]["step"] - 1)
            checks[f"capture_overhead_{run}_over_peer_same_layers"] = report.check(over, 1.0)
    return checks


def notes_of(rows: dict[str, dict[str, Any]], peer: dict[str, Any] | None) -> list[str]:
    """What the table does not say: memory, and in what the peer's work differs."""
    held, sides = correction_memory()
    notes = [
        f"memory held for the correction: {held / 1024:.0f} KiB, {held / sides:.0f} bytes per row and column of the "
        f"weights (rank {RANK}); its refresh, after steps 4, 12, 36, ..., takes one weight's second moment at a time"
    ]
    if peer is None:
        return notes
    times = {run: (rows[f"peer, {run}"]["step"] - 1) / (rows[run]["step"] - 1) for run in SKETCHES}
    return [
        *notes,
        f"peer (bergson {peer['version']}): memory held for the correction: {peer['correction_bytes'] / 1024:.0f} KiB, "
        "a copy of the captured weights' second moments, made anew after each step",
        f"the peer's overhead is {times['raw']:.2f} (raw) and {times['corrected']:.2f} (corrected) times ours, "
        f"for rows that cover {peer['coverage']:.0%} of the parameters where ours cover {rows['raw']['coverage']:.0%}",
        "the peer leaves out the head, the embeddings and biases; it writes rows on the training thread, ours on a "
        "thread of its own (`with writer`); ours also records every step's projected weights, gradient norm and audit",
    ]


def slowest(table: list[dict[str, Any]]) -> float:
    """The largest of our runs' ratios to a plain step."""
    return max(row["step"] for row in table if row["run"] in SKETCHES)


def main() -> None:
    chosen = report.parser_with_peer((__doc__ or "").splitlines()[0]).parse_args()
    steps = chosen.seeds or (24 if chosen.quick else 120)
    peer = peer_figures(chosen.peer_python, steps)
    with tempfile.TemporaryDirectory() as temporary:
        table = measure(SKETCHES | (ON_PEER_LAYERS if peer else {}), steps, Path(temporary))
    if chosen.quick and slowest(table) > GATE:
        # Steps of a machine with neighbours differ by a fifth: a longer look, not a wider gate.
        print(f"{slowest(table):.2f} of a plain step in {steps} steps: measured again in {4 * steps}")
        with tempfile.TemporaryDirectory() as temporary:
            table = measure(SKETCHES, 4 * steps, Path(temporary))
    rows = {row["run"]: row for row in [*table, *(peer_rows(peer) if peer else [])]}
    notes = notes_of(rows, peer)
    report.publish("capture_overhead", list(rows.values()), checks_of(rows), notes=notes, quick=chosen.quick)
    if chosen.quick and slowest(table) > GATE:
        raise SystemExit("capture costs more than a quarter of a step: something is badly slower than it was")


if __name__ == "__main__":
    main()
