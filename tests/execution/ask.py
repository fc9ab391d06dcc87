"""Ask everything that is spread over processes of one recorded run, and write the answers, bit for bit.

python ask.py LEDGER WEIGHTS RUNNER OUT
"""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.analysis.stages import STAGES, Classifier, margins, stage_data, train
from trainer_attrib import Analyzer, Examples
from trainer_attrib.analysis.passes import Snapshots
from trainer_attrib.evaluation.counterfactual import Retrained
from trainer_attrib.evaluation.subsets import random_subsets
from trainer_attrib.execution.runner import Runner


def answers(ledger: str, weights: str, runner: str | Runner, scratch: str) -> dict[str, np.ndarray]:
    """By name."""
    torch.set_num_threads(1)
    model = Classifier().double()
    model.load_state_dict(load_file(weights))
    analyzer, behavior = Analyzer(ledger, model, runner=runner), margins()
    found = {}
    for recipe in ("trackstar", "fisher", "tracin"):
        dense = analyzer.influence([behavior], recipe=recipe)
        found[recipe], found[f"{recipe} by source"] = dense.scores, _sums(dense)
        kept = analyzer.influence([behavior], recipe=recipe, keep=3, controls=())
        found |= {f"{recipe} kept": kept.scores, f"{recipe} places": kept.places}
    found["self-influence"] = np.array([row.score for row in analyzer.self_influence().rows])
    inputs, labels = stage_data("third")
    data = {"third": Examples.of_classes(inputs, labels, ids=[f"third/{i}" for i in range(24)], batch_size=4)}
    analyzer.sketch(data, ["end"])
    passed = analyzer.influence([behavior], ["third"], "grad_dot", data=data, source=Snapshots(("end",)))
    found["pass"] = passed.scores
    programs = {stage: lambda m, stage=stage: lambda: train(m, stage) for stage in STAGES}
    effects = analyzer.stage_effects([replace(behavior, batch_size=2)], ["subtract", "retrain"], programs)
    found["effects"] = np.array([row.effect for row in effects.rows])
    found["retrained"] = _retrained(analyzer, scratch)
    return {name: np.ascontiguousarray(values) for name, values in found.items()}


def _sums(found) -> np.ndarray:
    return np.array([row["sum"] for row in found.by_steps(3).to_pylist()])


def _retrained(analyzer: Analyzer, scratch: str) -> np.ndarray:
    def retrain(positions: np.ndarray, seed: int) -> torch.nn.Module:
        torch.manual_seed(seed)
        assert "RANK" not in os.environ, "a task takes other ranks for its own"
        model = Classifier().double()
        inputs, labels = stage_data("first")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(inputs[positions]), labels[positions]).backward()
            optimizer.step()
        return model

    ids = [str(i) for i in range(24)]
    models = Retrained(scratch, [margins()], ids, "three steps", retrain, runner=analyzer.runner)
    return models.measure(random_subsets(24, 5), (0, 1))


if __name__ == "__main__":
    ledger, weights, runner, out = sys.argv[1:]
    found = answers(ledger, weights, runner, f"{out}-retrained")
    np.savez(f"{out}-{os.environ.get('RANK', '0')}.npz", **found)
