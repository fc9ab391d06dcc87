"""Stage embeddings: exact where the behavior is linear and nothing reacts; data weights that do nothing under Adam."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.analysis.looped import Looped, network, weights_of
from tests.analysis.stages import STAGES, margins, three_stages
from trainer_attrib import Analyzer, Behavior
from trainer_attrib.analysis.effects.first_order import FirstOrder
from trainer_attrib.errors import NotComparableError


def linear(model: Any) -> Behavior:
    """Eight fixed combinations of the weights."""
    draws = [torch.randn(sum(p.numel() for p in model.parameters())).double() for _ in range(8)]
    flat = lambda model: torch.cat([p.reshape(-1) for p in model.parameters()])  # noqa: E731
    return Behavior("linear", draws, lambda model, items: torch.stack(items) @ flat(model))


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_where_gradients_do_not_depend_on_the_weights_it_is_retraining(
    kind: str, tmp_path: Path, monkeypatch: Any
) -> None:
    """A loss linear in the weights, a behavior linear in them: only weight decay acts on earlier updates. What the
    stage itself decayed of them (here 3 %) is where removing a stage and scaling it differ."""
    monkeypatch.setattr("tests.analysis.stages.Classifier", lambda: torch.nn.Sequential(torch.nn.Linear(6, 3)))
    run = three_stages(tmp_path, kind, loss=lambda out, y: out.gather(1, y[:, None]).mean())
    methods = ["first_order", "retrain"]
    rows = Analyzer(run.ledger, run.model).stage_effects([linear(run.model)], methods, run.programs).rows
    for stage in STAGES[:2]:
        found, exact = (
            torch.tensor([r.effect for r in rows if (r.stage, r.method) == (stage, m)])
            for m in ("first_order", "retrain")
        )
        assert (found - exact).norm() < 0.04 * exact.norm()


def test_embeddings_score_any_behavior_by_a_dot_product(tmp_path: Path) -> None:
    run, behavior = Looped(), margins(count=5)
    analyzer = run.analyzer(tmp_path, network(norm=False))
    rows = analyzer.stage_effects([behavior], "first_order").rows
    for stage, embedding in analyzer.stage_embeddings().items():
        if stage == "third":
            continue  # exact: not a derivative
        for query, row in enumerate(r for r in rows if r.stage == stage):
            analyzer.model.zero_grad()
            behavior.value_of(analyzer.model.eval(), query).backward()
            expected = sum(float((p.grad * embedding[n]).sum()) for n, p in analyzer.model.named_parameters())
            assert row.effect == pytest.approx(expected, rel=1e-9)
            assert row.read_out == "gradient . embedding"
            assert row.error_bar > 0


def scaled(run: Looped, stage: str, by: float) -> Looped:
    """The same training with one stage's losses multiplied."""

    class Scaled(Looped):
        def loop(self, name: str, model: Any) -> Any:
            loop = super().loop(name, model)
            return replace(loop, loss=lambda m, b: by * run_loss(m, b)) if name == stage else loop

    run_loss = run.loop(stage, network()).loss
    return Scaled(run.optimizer, run.steps, run.scales, run.carried, run.frozen, run.settings)


@pytest.mark.parametrize(("kind", "clip"), [("AdamW", None), ("SGD", 1e-3)])
def test_scaling_all_data_of_a_stage_does_nothing_under_adam_or_constant_clipping(
    kind: str, clip: float | None, tmp_path: Path
) -> None:
    """The proposition behind the refusal: no multiple of the stage's loss but 0 changes what it leads to."""
    run = Looped(kind, settings={"max_norm": clip})
    factual, without = (weights_of(r.train(network(norm=False))) for r in (run, run.without("second")))
    changed = weights_of(scaled(run, "second", 0.3).train(network(norm=False)))
    moved = sum(float((changed[n] - w).norm()) for n, w in factual.items())
    effect = sum(float((without[n] - w).norm()) for n, w in factual.items())
    assert moved < 1e-3 * effect
    if clip is None:  # under Adam the analyzer refuses the derivative
        analyzer = run.analyzer(tmp_path, network(norm=False))
        with pytest.raises(NotComparableError, match=r"'first' is no measure.*AdamW.*\n.*homogeneity"):
            analyzer.stage_effects([margins()], FirstOrder(of="data"))


def test_scaling_the_data_of_sgd_is_what_it_says(tmp_path: Path) -> None:
    """Of the last stage, whose derivative is known by training with slightly larger losses."""
    run, behavior = Looped("SGD", steps={"first": 12, "second": 1}), margins()
    analyzer = run.analyzer(tmp_path, network(norm=False))
    lineage = analyzer._view([behavior])
    embedding = FirstOrder(of="data").embedding(lineage, analyzer.lineage[-1])
    step = 1e-5
    there, here = (
        weights_of(scaled(run, "second", factor).train(network(norm=False))) for factor in (1 + step, 1 - step)
    )
    for name, value in embedding.items():
        torch.testing.assert_close(value, (there[name] - here[name]) / (2 * step), rtol=1e-6, atol=1e-10)
