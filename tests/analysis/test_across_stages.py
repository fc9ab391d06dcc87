"""Examples of an earlier stage, scored through the later ones: against leaving them out and training again."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.analysis.stages import STAGES, Classifier, margins, three_stages, train
from trainer_attrib import Analyzer, Behavior, SketchConfig
from trainer_attrib.analysis.effects.propagate import Propagate
from trainer_attrib.analysis.effects.slopes import gradients
from trainer_attrib.analysis.query_sketches import sketch_queries, sketch_vectors
from trainer_attrib.errors import MissingProgramError

RAW = SketchConfig(rank=64, dtype="float32", correction="none")


def mean_margin() -> Behavior:
    """One query: the mean margin of forty inputs."""
    items = margins(count=40)

    def measure(model: torch.nn.Module, batches: list) -> torch.Tensor:
        return torch.stack([items.measure(model, list(items.dataset)).mean() for _ in batches])

    return Behavior("mean margin", [0], measure)


def left_out(run, example: int, kind: str, lr: float) -> float:
    """The behavior without one example of the first stage, all stages trained again."""
    model = Classifier().double()
    model.load_state_dict(run.initial)

    def without(output, y):
        losses = F.cross_entropy(output, y, reduction="none")
        rows = without.rows
        without.rows = [(row + 6) % 24 for row in rows]
        return torch.stack([v for row, v in zip(rows, losses, strict=True) if row != example]).sum() / len(rows)

    without.rows = list(range(6))
    train(model, "first", kind, lr, loss=without)
    for stage in STAGES[1:]:
        train(model, stage, kind, lr)
    return float(mean_margin().values(model))


def test_carried_scores_are_closer_to_leaving_examples_out_than_gradients_at_the_end(tmp_path: Path) -> None:
    kind, lr = "sgd", 0.1
    run = three_stages(tmp_path, kind, lr=lr, sketch=RAW)
    analyzer, behavior = Analyzer(run.ledger, run.model), mean_margin()
    truth = np.array([float(behavior.values(run.model)) - left_out(run, i, kind, lr) for i in range(24)])
    found = {
        name: analyzer.influence([behavior], ["first"], "grad_dot", carry=carry, programs=run.loops)
        for name, carry in (("end", None), ("carried", Propagate(products=8, batches=100, thin=1)))
    }
    order = [list(found["end"].examples.ids).index(f"first/{i}") for i in range(24)]
    correlation = {name: np.corrcoef(f.scores[0][order], truth)[0, 1] for name, f in found.items()}
    assert correlation["carried"] > 0.9
    assert correlation["carried"] > correlation["end"] + 0.02


def test_the_last_stage_needs_no_carrying_and_no_program(tmp_path: Path) -> None:
    run = three_stages(tmp_path, "adamw", sketch=SketchConfig(rank=64, dtype="float32"))
    analyzer = Analyzer(run.ledger, run.model)
    plain, carried = (analyzer.influence([margins()], ["third"], carry=carry) for carry in (None, Propagate()))
    np.testing.assert_allclose(carried.scores, plain.scores, rtol=1e-4, atol=1e-5)
    with pytest.raises(MissingProgramError, match="third"):
        analyzer.influence([margins()], ["second"], carry=Propagate())


def test_sketches_of_gradients_are_the_sketches_of_queries(tmp_path: Path) -> None:
    run, behavior = three_stages(tmp_path, "adamw", sketch=SketchConfig(rank=3, dtype="float32")), margins()
    stage = Analyzer(run.ledger, run.model).lineage[1]
    vectors = list(gradients(run.model, behavior, dict(run.model.named_parameters())))
    for version in (0, 1, 2):
        queries = sketch_queries(run.model, stage, version, [behavior])
        torch.testing.assert_close(sketch_vectors(run.model, stage, version, vectors), queries, rtol=1e-4, atol=1e-6)
