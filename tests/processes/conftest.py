"""Starts a script in one process or several, as their launchers do."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node")
ACCELERATE = ("-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "1", "--mixed_precision", "no",
              "--dynamo_backend", "no", "--main_process_port", "0", "--num_processes")  # fmt: skip


@pytest.fixture(scope="session")
def launch() -> Callable[..., str]:
    """Runs ``script *arguments`` in ``processes`` processes; returns what it said. Fails if it fails or hangs."""

    def run(script: Path, *arguments: str | Path, processes: int = 1, launcher: Sequence[str] = TORCHRUN) -> str:
        started_by = [] if processes == 1 else [*launcher, str(processes)]
        environment = os.environ | {
            "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'integrations'}", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
            "CUDA_VISIBLE_DEVICES": "",
        }  # fmt: skip
        command = [sys.executable, *started_by, str(script), *map(str, arguments)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=180)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    return run
