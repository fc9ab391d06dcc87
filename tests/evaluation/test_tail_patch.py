from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from trainer_attrib.analysis.behavior import Behavior
from trainer_attrib.analysis.examples import Examples
from trainer_attrib.errors import EvaluationError
from trainer_attrib.evaluation.tail_patch import PatchStep, tail_patch


class Classifier(nn.Module):
    """Everything that a measurement could change: running means, dropout, modes, a frozen weight, gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)
        self.first.bias.requires_grad_(False)

    def forward(self, inputs):
        return self.last(nn.functional.dropout(self.norm(self.first(inputs)).tanh(), 0.5, self.training))


def classify(model, items):
    noise = 1e-3 * torch.randn(())  # a loss that draws random numbers
    logits = model(torch.stack([x for x, _ in items]))
    return nn.functional.cross_entropy(logits, torch.stack([y for _, y in items]), reduction="none") * (1 + 0 * noise)


def mean_loss(model, items):
    return model(torch.stack(items)).mean()


@pytest.fixture
def classification(float64):
    inputs, labels = torch.randn(10, 5), torch.randint(3, (10,))
    return (
        Classifier(),
        Examples(list(zip(inputs, labels, strict=True)), classify),
        Behavior.margin("margin", inputs[:4], labels[:4]),
    )


def test_a_linear_case_by_hand(world):
    """Losses are -w.x, so a step of size r adds r x to the weights and r x.q to the behavior."""
    made = world()
    found = tail_patch(
        made.model(),
        made.behavior,
        made.data,
        {"exact": made.effects},
        PatchStep(learning_rate=0.1),
        k=3,
    )
    largest = -np.sort(-made.effects, axis=1)[:, :3]
    np.testing.assert_allclose(found.alone["exact"], 0.1 * largest, rtol=1e-12)
    np.testing.assert_allclose(found.together["exact"], 0.1 * largest.mean(1), rtol=1e-12)
    assert found.score("exact").value == pytest.approx(0.1 * largest.mean())
    assert found.score("exact").standard_error == pytest.approx(0.1 * largest.mean(1).std(ddof=1) / np.sqrt(3))
    assert found.alone["random"].shape == (3, 3)
    assert np.isin(np.round(found.alone["random"] / 0.1, 9), np.round(made.effects, 9)).all()
    control = (found.alone["exact"] - found.alone["random"]).mean(1)
    assert found.beyond("exact").value == pytest.approx(control.mean())
    assert str(found).splitlines()[0].startswith("ranking  one of top 3, change")


def test_the_step_on_all_can_be_left_out(world):
    made = world()
    asked = made.behavior, made.data, {"exact": made.effects}, PatchStep(learning_rate=0.1)
    both, alone = (tail_patch(made.model(), *asked, k=3, together=together) for together in (True, False))
    assert alone.together == {}
    for ranking in ("exact", "random"):
        np.testing.assert_array_equal(alone.alone[ranking], both.alone[ranking])
    assert "all 3 in one step" in str(both)
    assert "all 3 in one step" not in str(alone)


def test_an_adam_step_divides_by_the_root_of_the_second_moments(world):
    made = world()
    moments = {"weight": torch.rand(1, 20, dtype=torch.float64)}
    step = PatchStep(learning_rate=0.1, second_moments=moments, epsilon=1e-3)
    found = tail_patch(made.model(), made.behavior, made.data, {"exact": made.effects}, step, k=1)
    best = made.effects.argmax(1)
    moved = 0.1 * made.examples[best] / (moments["weight"].sqrt() + 1e-3)
    expected = (made.queries * moved).sum(1).numpy()
    np.testing.assert_allclose(found.alone["exact"][:, 0], expected, rtol=1e-12)
    np.testing.assert_allclose(found.together["exact"], expected, rtol=1e-12)


def test_it_is_a_step_of_the_optimizer(classification):
    model, items, margin = classification
    model.eval()
    scores = np.random.default_rng(0).normal(size=(4, 10))
    found = tail_patch(model, margin, items, {"some": scores}, PatchStep(learning_rate=0.05), k=2)
    for query in range(4):
        best = np.argsort(-scores[query])[:2]
        for changed, chosen in ((found.alone["some"][query, 0], best[:1]), (found.together["some"][query], best)):
            other = Classifier()
            other.load_state_dict(model.state_dict())
            other.eval()
            optimizer = torch.optim.SGD([p for p in other.parameters() if p.requires_grad], lr=0.05)
            classify(other, items.items(chosen)).mean().backward()
            optimizer.step()
            assert changed == pytest.approx(float((margin.values(other) - margin.values(model))[query]), rel=1e-9)


def test_the_model_and_the_random_numbers_are_as_before(classification):
    model, items, margin = classification
    model(torch.randn(6, 5)).sum().backward()
    model.norm.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    random = torch.get_rng_state()
    asked = {"some": np.random.default_rng(0).normal(size=(4, 10))}
    found = tail_patch(model, margin, items, asked, PatchStep(learning_rate=0.05), k=2)
    assert np.abs(found.alone["some"]).min() > 0
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert {name for name, p in model.named_parameters() if p.grad is not None} == gradients.keys()
    assert all(torch.equal(p.grad, gradients[n]) for n, p in model.named_parameters() if n in gradients)
    assert torch.equal(torch.get_rng_state(), random)
    assert (model.training, model.norm.training, model.first.bias.requires_grad) == (True, False, False)

    def failing(model, items):
        raise RuntimeError("no loss")

    def failing_once_moved(model, items):
        if not torch.equal(model.last.weight, before["last.weight"]):
            raise RuntimeError("no margin")
        return margin.measure(model, items)

    broken = Behavior("broken", margin.dataset, failing_once_moved)
    with pytest.raises(RuntimeError, match="no margin"):
        tail_patch(model, broken, items, asked, PatchStep(learning_rate=0.05))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())

    with pytest.raises(RuntimeError, match="no loss"):
        tail_patch(model, margin, Examples(items.dataset, failing), asked, PatchStep(learning_rate=0.05))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training


def test_weights_without_a_learning_rate_stay(classification):
    model, items, margin = classification
    asked, step = {"some": np.random.default_rng(0).normal(size=(4, 10))}, PatchStep(learning_rate={"last.bias": 0.05})
    found = tail_patch(model, margin, items, asked, step, k=1)
    # The bias moves by -lr * (p - onehot), and the margin by the difference of two of its entries.
    model.eval()
    best = int(asked["some"][0].argmax())
    inputs, label = items.dataset[best]
    gradient = torch.softmax(model(inputs[None])[0], 0) - nn.functional.one_hot(label, 3)
    asked_about, own = items.dataset[0]
    logits, own = model(asked_about[None])[0].detach(), int(own)
    rival = int(logits.masked_fill(torch.arange(3) == own, -torch.inf).argmax())
    assert found.alone["some"][0, 0] == pytest.approx(float(-0.05 * (gradient[own] - gradient[rival]).detach()))


def test_one_step_serves_all_queries_and_rankings(world):
    made, seen = world(), []

    def losses(model, items):
        seen.append(len(items))
        return made.losses(model, items)

    same = np.tile(np.arange(12.0), (3, 1))
    data, step = Examples(list(made.examples), losses), PatchStep(learning_rate=1.0)
    tail_patch(made.model(), made.behavior, data, {"a": same, "b": same}, step, k=12)
    assert sorted(seen) == [1] * 12 + [12]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"rankings": {"random": np.ones((3, 12))}}, "is called 'random'"),
        ({"rankings": {"a": np.ones((2, 12))}}, "queries of the scores: 2, queries of the behavior: 3"),
        ({"rankings": {"a": np.ones((3, 11))}}, "examples of the scores: 11, examples: 12"),
        ({"examples": Examples(list(torch.ones(12, 20).double()), mean_loss)}, r"losses of 1 examples are \(\)"),
        ({"step": PatchStep(learning_rate={"wieght": 0.1})}, "moves none of the model's weights"),
        ({"step": PatchStep(learning_rate=0.1, second_moments={})}, "1 of 1 weights have no second moment"),
    ],
)
def test_what_cannot_be_patched_is_refused(world, options, said):
    made = world()
    step = PatchStep(learning_rate=0.1)
    asked = {"examples": made.data, "rankings": {"a": made.effects}, "step": step} | options
    with pytest.raises(EvaluationError, match=said):
        tail_patch(made.model(), made.behavior, **asked)
