"""What a peer is given, as files, and what it gives back; nothing here needs more than torch, numpy and safetensors.

    python -m lds_runs.adapters.task PEER FOLDER

The folder holds ``task.json``, ``data.npz`` and weights; scores go there as ``NAME.npy``, CPU time as ``PEER.json``.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset

from lds_runs import chargpt_model, digits_model

DIGITS, CHARGPT = "digits", "chargpt"


@dataclass(frozen=True)
class Task:
    """A trained model and its data.

    Args:
        testbed: ``DIGITS`` or ``CHARGPT``.
        config: of the testbed.
        seed: of the training.
        folder: for files.
        train: tensors whose first axis are the training examples.
        test: the same of the queries.
        weights: of the model at its last step.
        checkpoints: the model during its training, earliest first, the last one included.
        rates: learning rate at each of these.
        ensemble: models from other seeds, this one first.
    """

    testbed: str
    config: str
    seed: int
    folder: Path
    train: tuple[Tensor, ...]
    test: tuple[Tensor, ...]
    weights: dict[str, Tensor]
    checkpoints: list[dict[str, Tensor]]
    rates: list[float]
    ensemble: list[dict[str, Tensor]]

    def model(self, weights: dict[str, Tensor] | None = None) -> nn.Module:
        """In evaluation mode, with the weights of the last step by default."""
        net = self._new()
        net.load_state_dict(weights or self.weights)
        return net.eval()

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Loss of each example, [B]: cross entropy of the class, or mean cross entropy of the next characters."""
        if self.testbed == DIGITS:
            return cross_entropy(outputs, targets, reduction="none")
        return chargpt_model.next_losses(outputs, targets)

    def train_set(self) -> TensorDataset:
        """Inputs and targets of the examples."""
        return TensorDataset(self.train[0], self.train[-1])

    def test_set(self) -> TensorDataset:
        """Inputs and targets of the queries."""
        return TensorDataset(self.test[0], self.test[-1])

    def train_plainly(self) -> None:
        """The training itself: what costs are measured against."""
        net = self._new()
        if self.testbed == DIGITS:
            optimizer = digits_model.CONFIGS[self.config].optimizer(net.parameters())
            digits_model.train(net, optimizer, self.train, self.seed, lambda rows: nullcontext())
        else:
            chargpt_model.train(net, self.train[0], self.seed, self.config)

    def _new(self) -> nn.Module:
        if self.testbed == DIGITS:
            return digits_model.CONFIGS[self.config].model(self.seed)
        return chargpt_model.CharGPT(len(self.weights["characters.weight"]), self.train[0].shape[1])

    @staticmethod
    def read(folder: Path) -> Task:
        """From its files."""
        told = json.loads((folder / "task.json").read_text())
        with np.load(folder / "data.npz") as file:
            parts = {name: torch.from_numpy(file[name]) for name in file.files}
        train, test = (tuple(parts[n] for n in sorted(parts) if n.startswith(kind)) for kind in ("train", "test"))
        load = [load_file(folder / f"{name}.safetensors") for name in told["checkpoints"]]
        ensemble = [load_file(folder / f"{name}.safetensors") for name in told["ensemble"]]
        return Task(
            told["testbed"], told["config"], told["seed"], folder, train, test, load[-1], load, told["rates"], ensemble
        )


@dataclass(frozen=True)
class Method:
    """One setting of one peer.

    Args:
        name: shown in the table, with the setting.
        scores: task -> [Q, N], positive where training on the example helps the query.
        default: whether these are the peer's default settings.
        testbeds: where it runs.
        models: trained models that it needs beside the one that is explained.
    """

    name: str
    scores: Callable[[Task], Tensor | np.ndarray]
    default: bool = False
    testbeds: tuple[str, ...] = (DIGITS, CHARGPT)
    models: int = 0


def timed(work: Callable[[], Any], times: int) -> tuple[Any, float]:
    """What it returns, and the least CPU time of some runs, in seconds."""
    found, seconds = None, []
    for _ in range(times):
        began = time.process_time()
        found = work()
        seconds.append(time.process_time() - began)
    return found, min(seconds)


def main() -> None:
    """Score with every method of the peer; a method that fails says so."""
    torch.set_num_threads(1)
    peer, folder = sys.argv[1], Path(sys.argv[2])
    task, times = Task.read(folder), 2
    adapter = importlib.import_module(f"lds_runs.adapters.{peer}")
    methods = [method for method in adapter.METHODS if task.testbed in method.testbeds]
    rows: list[dict[str, Any]] = []
    for method in methods:
        row = {"name": method.name, "default": method.default, "models": method.models}
        try:
            runs = times if task.testbed == DIGITS else 1
            scores, seconds = timed(lambda method=method: method.scores(task), runs)
            scores = np.asarray(scores, dtype=np.float32)
            if not np.isfinite(scores).all():
                raise ValueError(f"{(~np.isfinite(scores)).mean():.0%} of the scores are not finite")
            _, training = timed(task.train_plainly, runs)
            np.save(folder / f"{peer}-{len(rows)}.npy", scores)
            row |= {"scores": f"{peer}-{len(rows)}.npy", "ratio": seconds / training, "seconds": seconds}
        except Exception as error:  # whatever it is, it becomes this row's text
            traceback.print_exc()
            row |= {"failed": f"{type(error).__name__}: {error}"[:200]}
        rows.append(row)
    version = metadata.version(adapter.PACKAGE)
    (folder / f"{peer}.json").write_text(json.dumps({"version": version, "rows": rows}))


if __name__ == "__main__":
    main()
