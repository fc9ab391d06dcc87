"""Runs the peers, each by its own Python, on a trained model that is handed over as files.

A peer's environment is a folder of its name in the folder of the variable ``TRAINER_ATTRIB_PEERS``, ``.peers`` in the
repository's root by default. A peer that has none is skipped, and a message says how to make it.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.torch import save_file
from torch import Tensor

from lds_runs.testbed import STAGE, Trained
from trainer_attrib import Ledger

PEERS = {
    "dattri": "dattri==0.3.0",
    "dattri_llm": "dattri-llm==0.1.0",
    "kronfluence": "kronfluence==1.0.1",
    "captum": "captum==0.9.0",
    "traker": "traker==0.3.2",
}
_BENCHMARKS = Path(__file__).parents[1]


@dataclass(frozen=True)
class PeerScores:
    """One setting of one peer.

    Args:
        name: with the setting.
        default: whether these are the peer's default settings.
        models: trained models that it needs beside the explained one.
        scores: [Q, N], positive where training on the example helps the query; None if it failed.
        ratio: CPU time over that of one plain training in the same process.
        failed: why there are no scores.
    """

    name: str
    default: bool
    models: int
    scores: np.ndarray | None
    ratio: float
    failed: str = ""


def environment(peer: str) -> Path | None:
    """The peer's Python, or None, with a message that says how to install it."""
    folder = Path(os.environ.get("TRAINER_ATTRIB_PEERS") or _BENCHMARKS.parent / ".peers") / peer
    python = folder / "bin" / "python"
    if python.exists():
        return python
    print(f"{peer} is skipped: no environment in {folder}. benchmarks/README.md says how to make it ({PEERS[peer]}).")
    return None


def peer_scores(run: Trained, testbed: str, ensemble: list[dict[str, Tensor]]) -> Iterator[PeerScores]:
    """Every setting of every peer that is installed."""
    for peer in PEERS:
        if python := environment(peer):
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


def _run(peer: str, python: Path, folder: Path) -> Iterator[PeerScores]:
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    variables |= {"PYTHONPATH": str(_BENCHMARKS), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    ran = subprocess.run(
        [str(python), "-m", "lds_runs.adapters.task", peer, str(folder)],
        cwd=folder, env=variables, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if ran.returncode:
        print(f"{peer} failed: {ran.stderr.strip()[-1000:]}")
        return
    for row in json.loads((folder / f"{peer}.json").read_text())["rows"]:
        scores = np.load(folder / row["scores"]) if "scores" in row else None
        failed = row.get("failed", "")
        yield PeerScores(row["name"], row["default"], row["models"], scores, row.get("ratio", float("nan")), failed)
