"""What breaks other implementations of influence: batch sizes, biases, sequences, equal examples, wide projections."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from trainer_attrib import Analyzer, Behavior, Examples, Recorder, SketchConfig
from trainer_attrib.analysis.effects.between_snapshots import BetweenSnapshots
from trainer_attrib.analysis.recipes.gauss_newton import GaussNewton
from trainer_attrib.evaluation.adapters import scores_of

EXAMPLES, LENGTH, CLASSES, EPOCHS = 8, 3, 3, 2
SPANS = (slice(0, 24), slice(24, 39))  # of the two layers, biases included: many more coordinates than examples
CAPTURED = ("grad_cos", "grad_dot", "fisher", "trackstar")


class Tagger(nn.Module):
    """A class for every place of a sequence, [B, S, 5] to [B, S, 3]."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(5, 4), nn.Linear(4, CLASSES)

    def forward(self, x):
        return self.head(torch.tanh(self.body(x)))


def data(seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(EXAMPLES, LENGTH, 5, generator=generator).double()
    return list(zip(x, torch.randint(0, CLASSES, (EXAMPLES, LENGTH), generator=generator), strict=True))


def losses(model, items):
    x, y = (torch.stack(column) for column in zip(*items, strict=True))
    return F.cross_entropy(model(x).transpose(1, 2), y, reduction="none").mean(1)


def fisher(model, items, generator):
    """Every class of every place: the Gauss-Newton matrix itself."""
    for at in range(LENGTH * CLASSES):
        place, label = divmod(at, CLASSES)
        logits = model(torch.stack([x for x, _ in items])).log_softmax(-1)[:, place, label]
        yield -logits * logits.detach().exp().div(LENGTH).sqrt()


def behavior(items):
    return Behavior("log-likelihood", items, lambda model, some: -losses(model, some))


def recorded(folder, items, batch_size=4, lr=0.0):
    """Trained on the items in their order; a learning rate of 0 keeps the weights for every row."""
    torch.manual_seed(0)
    model = Tagger().double()
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    batches = list(torch.arange(len(items)).split(batch_size)) * EPOCHS
    sketch = SketchConfig(rank=16, dtype="float32", correction="none")
    with Recorder(
        folder, stage="only", model=model, optimizer=optimizer, sketch=sketch, strict=True, total_steps=len(batches)
    ) as recorder:
        for rows in batches:
            optimizer.zero_grad()
            with recorder.batch([f"{int(i)}" for i in rows], denominator=len(rows)):
                losses(model, [items[i] for i in rows]).mean().backward()
            optimizer.step()
    return Analyzer(folder, model), model


def scores(analyzer, items, queries, recipe, batch_size=64):
    ids = [f"{i}" for i in range(len(items))]
    given = {"only": Examples(items, losses, ids, fisher=fisher, batch_size=batch_size)}
    found = analyzer.influence([behavior(queries)], recipe=recipe, data=given, controls=())
    return scores_of(found, ids)


def gradients(model, values):
    """Dense, each weight with its bias as the last column, [N, 39]."""
    found = []
    for value in values:
        grads = torch.autograd.grad(value, list(model.parameters()), retain_graph=True)
        pairs = zip(grads[::2], grads[1::2], strict=True)
        found.append(torch.cat([torch.cat([w, b[:, None]], 1).flatten() for w, b in pairs]))
    return torch.stack(found)


@pytest.mark.parametrize("recipe", ["grad_cos", "grad_dot", "fisher"])
def test_sequences_through_biased_layers_have_their_dense_scores(tmp_path, recipe):
    items, queries = data(), data(1)[:3]
    analyzer, model = recorded(tmp_path / "run", items)
    q, g = gradients(model, -losses(model, queries)), gradients(model, losses(model, items))
    if recipe == "grad_cos":
        q, g = F.normalize(q, dim=1), F.normalize(g, dim=1)
    expected = -q @ g.T
    if recipe == "fisher":
        expected = 0
        for span in SPANS:
            moment = g[:, span].T @ g[:, span] / len(g)
            slack = 0.1 * moment.diagonal().mean() * torch.eye(len(moment)).double()
            expected = expected - q[:, span] @ torch.linalg.solve(moment + slack, g[:, span].T)
    found = scores(analyzer, items, queries, recipe)
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_gauss_newton_of_sequences_through_biased_layers_has_its_dense_scores(tmp_path):
    items, queries = data(), data(1)[:3]
    analyzer, model = recorded(tmp_path / "run", items, lr=0.5)
    metric = BetweenSnapshots(analyzer.lineage[0]).metric(0, 4)
    reach = float(metric["body.weight"].mean())  # of plain SGD: the same for every weight
    assert all(torch.allclose(m.double(), torch.tensor(reach).double()) for m in metric.values())
    q, g = gradients(model, -losses(model, queries)), gradients(model, losses(model, items))
    parts = gradients(model, torch.cat(list(fisher(model, items, torch.Generator()))))
    expected = 0
    for span in SPANS:
        curvature = reach * parts[:, span].T @ parts[:, span] / EXAMPLES + torch.eye(span.stop - span.start).double()
        expected = expected - reach * q[:, span] @ torch.linalg.solve(curvature, g[:, span].T) / EXAMPLES
    assert not np.allclose(expected, (-reach * q @ g.T / EXAMPLES).numpy(), rtol=0.05)  # curvature matters here
    found = scores(analyzer, items, queries, GaussNewton(snapshots=("end",)))
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("recipe", CAPTURED)
def test_rows_do_not_depend_on_the_batches_of_training(tmp_path, recipe):
    items, queries = data(), data(1)[:3]
    found = [
        scores(recorded(tmp_path / f"{size}", items, size)[0], items, queries, recipe) for size in (1, 3, len(items))
    ]
    for other in found[1:]:
        np.testing.assert_allclose(other, found[0], rtol=1e-3, atol=1e-4 * np.abs(found[0]).max())


@pytest.mark.parametrize("recipe", ["gauss_newton", "directional"])
def test_given_examples_do_not_depend_on_batches(tmp_path, recipe):
    items, queries = data(), data(1)[:3]
    analyzer, _ = recorded(tmp_path / "run", items, lr=0.5)
    found = [scores(analyzer, items, queries, recipe, size) for size in (1, 3, len(items))]
    for other in found[1:]:
        np.testing.assert_allclose(other, found[0], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("recipe", [*CAPTURED, "tracin", "gauss_newton", "directional"])
def test_equal_examples_stay_two_with_the_same_scores(tmp_path, recipe):
    items = data()
    items.append(items[1])  # in another batch than the first
    queries = [*data(1)[:2], items[1], items[1]]
    captured = recipe in CAPTURED
    analyzer, _ = recorded(tmp_path / "run", items, batch_size=3, lr=0.0 if captured else 1e-3)
    found = scores(analyzer, items, queries, recipe)
    assert found.shape == (4, EXAMPLES + 1)
    assert found.any(axis=1).all()
    tolerance = 1e-2 if recipe == "tracin" else 1e-4  # the weights moved between the two
    np.testing.assert_allclose(found[:, 1], found[:, -1], rtol=tolerance, atol=tolerance * np.abs(found).max())
    np.testing.assert_allclose(found[2], found[3], rtol=1e-6)


@pytest.mark.parametrize("recipe", ["grad_cos", "fisher", "trackstar", "gauss_newton"])
def test_with_more_coordinates_than_examples_each_example_still_explains_itself(tmp_path, recipe):
    items = data()
    analyzer, _ = recorded(tmp_path / "run", items, lr=0.5 if recipe == "gauss_newton" else 0.0)
    found = scores(analyzer, items, items, recipe)
    assert np.isfinite(found).all()
    assert (found.argmax(1) == np.arange(EXAMPLES)).all()
    assert (found.diagonal() > 0).all()
