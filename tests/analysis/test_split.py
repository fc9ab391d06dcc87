"""Parts of a stage's effect: what they add up to, and that they are the executed updates' parts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.analysis.stages import Classifier, margins, three_stages
from trainer_attrib import Analyzer, Behavior, SketchConfig
from trainer_attrib.analysis.query_sketches import sketch_vectors
from trainer_attrib.analysis.split import _of_steps, _sketched_steps

FULL = SketchConfig(rank=64, dtype="float32", correction="none")


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
@pytest.mark.parametrize("stage", ["first", "third"])
def test_steps_examples_and_sources_each_add_up_to_the_effect(kind: str, stage: str, tmp_path: Path) -> None:
    run = three_stages(tmp_path, kind, sketch=FULL)
    analyzer = Analyzer(run.ledger, run.model)
    [found] = analyzer.split(stage, [margins()], programs=run.loops)
    rows = analyzer.stage_effects([margins()], "replay", run.loops).rows
    effect = sum(row.effect for row in rows if row.stage == stage) / 7
    assert found.effect == pytest.approx(effect, rel=1e-9)
    for parts in (found.steps, found.examples, found.sources):
        assert sum(parts.values()) == pytest.approx(effect, rel=1e-6)
    assert list(found.steps) == list(range(1, 17))
    assert len(found.examples) == 24
    assert found.to_table().column_names == ["behavior", "stage", "kind", "name", "part"]
    assert "replay" in repr(found)


def test_with_whole_sketches_a_step_s_part_is_the_inner_product_with_its_update(tmp_path: Path) -> None:
    run = three_stages(tmp_path, "adamw", sketch=FULL)
    stage = Analyzer(run.ledger, run.model).lineage[2]
    vector = {name: torch.randn_like(p) for name, p in run.model.named_parameters()}
    raw = sketch_vectors(run.model, stage, 0, [vector])[0]
    start, end = stage.snapshot("start"), stage.snapshot("end")
    exact = sum(float((vector[n] * (end[n] - start[n])).sum()) for n in vector)
    assert sum(_sketched_steps(run.model, stage, raw).values()) == pytest.approx(exact, rel=1e-4)
    narrow = torch.randn_like(raw)  # sketches that say nothing: the sum over the stage is exact all the same
    assert sum(_of_steps(run.model, stage, vector, narrow).values()) == pytest.approx(exact, rel=1e-9)


def test_the_examples_of_a_source_that_teaches_a_class_get_its_effect(tmp_path: Path) -> None:
    """Half of a stage's examples have one label; the behavior is how much that label is preferred."""
    run = three_stages(tmp_path, "sgd", lr=0.05, sketch=FULL)
    inputs = torch.randn(12, 6).double()

    def measure(model: torch.nn.Module, items: list) -> torch.Tensor:
        return model(torch.stack(items)).log_softmax(1)[:, 0]

    _, labels = run.data["third"]
    [found] = Analyzer(run.ledger, run.model).split("third", [Behavior("class 0", list(inputs), measure)])
    own = [found.examples[f"third/{i}"] for i in range(24) if labels[i] == 0]
    others = [found.examples[f"third/{i}"] for i in range(24) if labels[i] != 0]
    assert min(own) > max(0.0, sum(others) / len(others))
    assert isinstance(run.model, Classifier)
