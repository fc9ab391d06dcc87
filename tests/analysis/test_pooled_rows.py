"""Rows whose layers share blocks of columns."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from trainer_attrib import Analyzer, Behavior, Examples, Recorder, SketchConfig
from trainer_attrib.errors import ConfigurationError
from trainer_attrib.tap.plan import SketchPlan, plan_sketch
from trainer_attrib.tap.projections import Projections
from trainer_attrib.testing.oracle import project_gradient


def tower(depth=4):
    torch.manual_seed(0)
    layers = [part for _ in range(depth) for part in (nn.Linear(6, 6), nn.Tanh())]
    return nn.Sequential(*layers, nn.Linear(6, 3)).double()


def recorded(folder, sketch, depth=4, steps=4):
    """Twelve examples, one batch, at a learning rate of 0: every row is of the same weights."""
    model = tower(depth)
    x, y = torch.randn(12, 6).double(), torch.arange(12) % 3
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    with Recorder(folder, stage="only", model=model, optimizer=optimizer, sketch=sketch, strict=True) as recorder:
        for _ in range(steps):
            optimizer.zero_grad()
            with recorder.batch([str(n) for n in range(12)], denominator=12):
                F.cross_entropy(model(x), y).backward()
            optimizer.step()
    return model, x, y


def gradients(model, x, y):
    names = [name for name, _ in model.named_parameters()]
    losses = [F.cross_entropy(model(x[n : n + 1]), y[n : n + 1]) for n in range(len(x))]
    return [dict(zip(names, torch.autograd.grad(loss, list(model.parameters())), strict=True)) for loss in losses]


def test_weights_of_one_shape_share_at_most_so_many_blocks_and_depth_does_not_widen_rows():
    widths = []
    for depth in (3, 6, 12):
        plan = plan_sketch(tower(depth), SketchConfig(rank=4, blocks=2))
        assert len(plan.row_spans) == 3  # two of 4 x 4, and the head's 3 x 4
        assert plan.row_spans[-1].stop == plan.row_width == 2 * 16 + 12
        widths.append(plan.row_width)
        assert SketchPlan.from_dict(plan.to_dict()) == plan
    assert len(set(widths)) == 1
    apart = plan_sketch(tower(3), SketchConfig(rank=4))
    assert "blocks" not in apart.to_dict()
    assert apart.row_spans == [weight.span for weight in apart.weights]
    many = plan_sketch(tower(3), SketchConfig(rank=4, blocks=99))
    assert many.row_width == apart.width


def test_rows_are_sums_of_the_projections_of_a_block_s_weights(tmp_path):
    sketch = SketchConfig(rank=4, dtype="float32", correction="none", blocks=2)
    model, x, y = recorded(tmp_path, sketch)
    stage = Analyzer(tmp_path, model).lineage[0]
    plan = SketchPlan.from_dict(stage.meta["plan"])
    assert stage.width == plan.row_width == 44
    projections = Projections(plan, model)
    exact = torch.stack([project_gradient(plan, projections, g) for g in gradients(model, x, y)])
    sums = [exact[:, plan.weights[i].span] + exact[:, plan.weights[i + 1].span] for i in (0, 2)]
    expected = torch.cat([*sums, exact[:, plan.weights[4].span]], dim=1)
    [block] = list(stage.rows())
    found = (
        torch.from_numpy(np.array(block.sketches)) * torch.from_numpy(block.table["norm"].to_numpy().copy())[:, None]
    )
    for row, example in zip(found, block.table["example"].to_pylist(), strict=True):
        torch.testing.assert_close(row, expected[int(example)].float(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("recipe", ["grad_dot", "grad_cos", "trackstar", "fisher"])
def test_queries_are_pooled_like_rows(tmp_path, recipe):
    """An example that is its own query: captured row and query sketch are the same vector, so that its cosine is 1."""
    sketch = SketchConfig(rank=4, dtype="float32", blocks=2)
    model, x, y = recorded(tmp_path, sketch, steps=8)  # raw rows, then corrected ones
    behavior = Behavior("own", list(zip(x, y, strict=True)), losses)
    found = Analyzer(tmp_path, model).influence([behavior], recipe=recipe)
    scores = -found.scores[:, np.argsort([int(example) for example in found.examples.ids])]
    if recipe in ("grad_cos", "trackstar"):
        np.testing.assert_allclose(np.diag(scores), 1, atol=1e-4)
    else:
        np.testing.assert_allclose(scores, scores.T, rtol=1e-3, atol=1e-3 * np.abs(scores).max())
        assert (np.diag(scores) > 0).all()


def losses(model, items):
    x, y = (torch.stack(side) for side in zip(*items, strict=True))
    return F.cross_entropy(model(x), y, reduction="none")


def test_products_of_rows_are_those_of_gradients_in_expectation():
    model = tower()
    x, y = torch.randn(2, 6).double(), torch.tensor([0, 1])
    first, second = gradients(model, x, y)
    truth = sum(float((first[name] * second[name]).sum()) for name in first)
    found = []
    for seed in range(300):
        plan = plan_sketch(model, SketchConfig(rank=4, blocks=1, seed=seed))
        rows = plan.pool(torch.stack([project_gradient(plan, Projections(plan, model), g) for g in (first, second)]))
        found.append(float(rows[0] @ rows[1]))
    assert abs(np.mean(found) - truth) < 4 * np.std(found) / len(found) ** 0.5
    assert np.std(found) < 3 * abs(truth)


def test_passes_over_given_data_are_pooled_too(tmp_path):
    model, x, y = recorded(tmp_path, SketchConfig(rank=4, dtype="float32", correction="none", blocks=2))
    behavior = Behavior("own", list(zip(x, y, strict=True)), losses)
    analyzer, data = Analyzer(tmp_path, model), {"only": Examples.of_classes(x, y)}
    captured = analyzer.influence([behavior], recipe="grad_cos")
    made = analyzer.influence([behavior], recipe="grad_cos", data=data, source="snapshot")
    order = [np.argsort([int(example) for example in found.examples.ids]) for found in (captured, made)]
    np.testing.assert_allclose(captured.scores[:, order[0]], made.scores[:, order[1]], atol=1e-4)


def test_a_number_of_blocks_that_cannot_work_is_refused():
    with pytest.raises(ConfigurationError, match="blocks=0"):
        SketchConfig(blocks=0)
