"""Runs the peers, each by its own Python, on a trained model that is handed over as files.

A peer's environment is the folder of its name in ``.peers`` in the repository's root, unless an option names another.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from safetensors.torch import save_file
from torch import Tensor

from lds_runs.testbed import PEER, STAGE, Scored, Trained
from trainer_attrib import Ledger

PEERS = {
    "dattri": "dattri==0.3.0",
    "dattri_llm": "dattri-llm==0.1.0",
    "kronfluence": "kronfluence==1.0.1",
    "captum": "captum==0.9.0",
    "traker": "traker==0.3.2",
    "bergson": "bergson==2.5.1",
}
_BENCHMARKS = Path(__file__).parents[1]


def chosen(given: Sequence[str]) -> dict[str, Path]:
    """The Python of every peer that has one; others are skipped with a message that says how to install them.

    Args:
        given: ``NAME=PYTHON``, beside the environments in ``.peers``.
    """
    named = dict(pair.split("=", 1) for pair in given)
    if unknown := set(named) - set(PEERS):
        raise SystemExit(f"--peers names {sorted(unknown)}; there are adapters for {sorted(PEERS)}.")
    found = {}
    for peer, package in PEERS.items():
        python = Path(named.get(peer, _BENCHMARKS.parent / ".peers" / peer / "bin" / "python"))
        if python.exists():
            found[peer] = python
        else:
            print(f"{peer} is left out: no Python at {python}. benchmarks/README.md: how to make one with {package}.")
    return found


def peer_scores(
    peer: str, python: Path, run: Trained, testbed: str, ensemble: list[dict[str, Tensor]]
) -> Iterator[Scored]:
    """Every setting of a peer."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        _write(run, testbed, ensemble, folder)
        yield from _run(peer, python, folder)


def _write(run: Trained, testbed: str, ensemble: list[dict[str, Tensor]], folder: Path) -> None:
    stage = Ledger(run.ledger).stage(STAGE)
    rates = {row["step"]: row["learning_rate"][0] for row in stage.steps().to_pylist()}
    inside = [snapshot for snapshot in stage.meta["snapshots"] if snapshot["step"]]
    for number, snapshot in enumerate(inside):
        save_file(stage.snapshot(snapshot["name"]), folder / f"checkpoint-{number}.safetensors")
    for number, weights in enumerate(ensemble):
        save_file(weights, folder / f"ensemble-{number}.safetensors")
    parts = {"train": run.train, "test": run.test}
    arrays = {f"{kind}{n}": part.numpy() for kind, group in parts.items() for n, part in enumerate(group)}
    np.savez(folder / "data.npz", **arrays)
    told = {
        "testbed": testbed, "config": run.config, "seed": run.seed,
        "rates": [rates[snapshot["step"]] for snapshot in inside],
        "checkpoints": [f"checkpoint-{n}" for n in range(len(inside))],
        "ensemble": [f"ensemble-{n}" for n in range(len(ensemble))],
    }  # fmt: skip
    (folder / "task.json").write_text(json.dumps(told))


def _run(peer: str, python: Path, folder: Path) -> Iterator[Scored]:
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    variables |= {"PYTHONPATH": str(_BENCHMARKS), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    ran = subprocess.run(
        [str(python), "-m", "lds_runs.adapters.task", peer, str(folder)],
        cwd=folder, env=variables, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if ran.returncode:
        yield Scored(peer, PEER, True, 1, None, float("nan"), f"it ended: {ran.stderr.strip()[-300:]}")
        return
    told = json.loads((folder / f"{peer}.json").read_text())
    for row in told["rows"]:
        scores = np.load(folder / row["scores"]) if "scores" in row else None
        name = row["name"].replace(" ", f" {told['version']} ", 1)
        failed, ratio = row.get("failed", ""), row.get("ratio", float("nan"))
        yield Scored(name, PEER, row["default"], 1 + row["models"], scores, ratio, failed)
