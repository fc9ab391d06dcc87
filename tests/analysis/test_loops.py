"""Plain loops as programs: a loop trains as written and as driven; what thinning keeps; iterables of losses."""

from __future__ import annotations

import itertools
from collections import namedtuple
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from trainer_attrib.analysis.loops import Loop
from trainer_attrib.analysis.programs import Losses, Steps, steps_of
from trainer_attrib.analysis.thinning import thin_rows
from trainer_attrib.errors import ConfigurationError

pytestmark = pytest.mark.usefixtures("float64")
ROWS = 11


def data() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(ROWS, 4, generator=generator), torch.arange(ROWS) % 3


def model_of(dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Dropout(dropout), nn.Linear(5, 3))


def loss_of(model: nn.Module, batch: Any) -> torch.Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.02)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def halving(optimizer: torch.optim.Optimizer) -> Any:
    return torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)


def by_hand(model: nn.Module, make_optimizer: Any, schedule: bool) -> None:
    """The training that the loops below stand for: 7 steps over 6 batches of 2, accumulated by 4, clipped."""
    optimizer, loader = make_optimizer(model), DataLoader(TensorDataset(*data()), batch_size=2, shuffle=True)
    rates = halving(optimizer) if schedule else None
    taken = 0
    while taken < 7:
        for i, batch in enumerate(loader):
            (loss_of(model, batch) / (4 if i < 4 else 2)).backward()
            if (i + 1) % 4 == 0 or i == 5:
                nn.utils.clip_grad_norm_(model.parameters(), 0.3)
                optimizer.step()
                optimizer.zero_grad()
                if rates is not None:
                    rates.step()
                taken += 1
                if taken == 7:
                    break


@pytest.mark.parametrize("make_optimizer", [adamw, sgd])
@pytest.mark.parametrize("schedule", [False, True])
def test_a_loop_trains_as_one_written_by_hand_and_as_driven(make_optimizer: Any, schedule: bool) -> None:
    ended = []
    for way in ("by hand", "train", "driven"):
        model = model_of(dropout=0.3)
        loader = DataLoader(TensorDataset(*data()), batch_size=2, shuffle=True)
        loop = Loop(model, loss_of, loader, make_optimizer, 7, 4, 0.3, halving if schedule else None)
        torch.manual_seed(3)
        if way == "by hand":
            by_hand(model, make_optimizer, schedule)
        elif way == "train":
            loop.train()
        else:
            steps = steps_of(loop)
            assert isinstance(steps, Steps)
            assert steps.model is model
            optimizer = steps.optimizer()
            for step in itertools.islice(steps.steps(), 7):
                optimizer.zero_grad()
                for loss in step.losses:
                    loss().backward()
                steps.clip()
                optimizer.step()
                for group in optimizer.param_groups:
                    group["lr"] *= 0.5 if schedule else 1.0
        ended.append([p.detach().clone() for p in model.parameters()])
    initial = list(model_of().parameters())
    assert not any(torch.equal(p, q) for p, q in zip(ended[0], initial, strict=True))
    assert all(torch.equal(p, q) for p, q in zip(ended[0], ended[1], strict=True))
    assert all(torch.equal(p, q) for p, q in zip(ended[1], ended[2], strict=True))


@pytest.mark.parametrize("kind", ["loader", "ready batches", "loader without batches"])
@pytest.mark.parametrize(("thin", "accumulate"), [(2, 1), (3, 1), (2, 2), (8, 2), (100, 3)])
def test_thinned_steps_are_means_over_what_is_kept(kind: str, thin: int, accumulate: int) -> None:
    """What is kept changes from epoch to epoch, until every example has been kept."""
    x, y = data()
    ready = [(x[i : i + 4], y[i : i + 4]) for i in range(0, ROWS, 4)]
    batches: Any = {
        "loader": DataLoader(TensorDataset(x, y), batch_size=4),
        "ready batches": ready,
        "loader without batches": DataLoader(ready, batch_size=None),  # type: ignore[arg-type]
    }[kind]
    model, seen, totals = model_of(), set(), [4, 4, 3]
    inputs: list[Any] = []

    def loss(model: Any, batch: Any) -> torch.Tensor:
        inputs.append(batch)
        return loss_of(model, batch)

    for number, step in enumerate(itertools.islice(Loop(model, loss, batches, sgd, 1, accumulate).steps(thin), 36)):
        inputs.clear()
        found = torch.autograd.grad(sum(loss() for loss in step.losses), list(model.parameters()))
        per_epoch = -(-3 // accumulate)
        window = totals[number % per_epoch * accumulate :][:accumulate]
        kept = [[int((x == row).all(1).nonzero()) for row in batch[0]] for batch in inputs]
        assert all(kept)
        assert step.share == sum(map(len, kept)) / sum(window)
        means = [loss_of(model, (x[rows], y[rows])) for rows in kept]
        expected = torch.autograd.grad(sum(means) / len(means), list(model.parameters()))
        for mine, theirs in zip(found, expected, strict=True):
            assert torch.allclose(mine, theirs, rtol=1e-12, atol=1e-15)
        seen |= set(itertools.chain(*kept))
    assert seen == set(range(ROWS))


@pytest.mark.parametrize(
    ("thin", "accumulate", "share"),
    [(1, 1, 1), (2, 1, 1 / 2), (3, 1, 3 / 8), (8, 1, 1 / 8), (100, 1, 1 / 8), (2, 2, 1 / 2), (4, 2, 1 / 4),
     (100, 2, 1 / 16), (6, 3, 1 / 6)],
)  # fmt: skip
def test_the_share_that_is_kept(thin: int, accumulate: int, share: float) -> None:
    loader = DataLoader(TensorDataset(torch.randn(48, 4), torch.zeros(48)), batch_size=8)
    step = next(Loop(model_of(), loss_of, loader, sgd, 1, accumulate).steps(thin))
    assert step.share == share
    assert len(step.losses) == max(1, accumulate // thin)


def test_nothing_is_left_on_the_users_loader() -> None:
    loader = DataLoader(TensorDataset(*data()), batch_size=4)
    before = dict(loader.__dict__)
    step = next(iter(Loop(model_of(), loss_of, loader, sgd, 1).steps(2)))
    assert step.share == 0.5
    assert loader.__dict__ == before


Pair = namedtuple("Pair", ["left", "right"])


def test_rows_of_nested_batches() -> None:
    """Whatever is not as long as the first tensor stays whole; classes stay."""
    rows = torch.arange(5)
    batch = {"x": rows, "more": [Pair(rows + 10, torch.ones(3)), ("text", torch.tensor(7))], "n": 5}
    thinned = thin_rows(batch, 2, 1)
    assert (thinned.kept, thinned.total) == (2, 5)
    assert thinned.batch["x"].tolist() == [1, 3]
    pair = thinned.batch["more"][0]
    assert isinstance(pair, Pair)
    assert pair.left.tolist() == [11, 13]
    assert len(pair.right) == 3
    assert thinned.batch["more"][1] == ("text", torch.tensor(7))
    assert batch["x"] is rows
    assert thin_rows({"text": "alone"}, 3, 0) == ({"text": "alone"}, 1, 1)
    assert thin_rows(rows, 9, 7).batch.tolist() == [2]


def test_batches_that_end() -> None:
    batches = iter([(data()[0], data()[1])])
    steps = Loop(model_of(), loss_of, batches, sgd, 1).steps()
    next(steps)
    with pytest.raises(ConfigurationError, match="after 1 steps"):
        next(steps)


@pytest.mark.parametrize("thin", [0, 2.5])
def test_thin_must_be_a_whole_number(thin: Any) -> None:
    with pytest.raises(ConfigurationError, match="whole number"):
        next(Loop(model_of(), loss_of, [data()], sgd, 1).steps(thin))


def test_an_iterable_of_losses_is_driven_too() -> None:
    model = model_of()
    losses = [lambda: loss_of(model, data()), lambda: 2 * loss_of(model, data())]

    def anew() -> Iterator[Any]:
        yield from losses

    for program, often in ((losses, 2), (anew, 2), (iter(losses), 1)):
        steps = steps_of(program, model)
        assert isinstance(steps, Losses)
        assert isinstance(steps, Steps)
        for _ in range(often):
            taken = list(steps.steps(thin=3))
            assert [step.share for step in taken] == [1.0, 1.0]
            values = [loss().item() for step in taken for loss in step.losses]
            assert values[1] == 2 * values[0] > 0
        steps.clip()
    with pytest.raises(ConfigurationError, match="iterator"):
        steps.steps()
    with pytest.raises(ConfigurationError, match="Loop"):
        steps.optimizer()


@pytest.mark.parametrize("prepared", [lambda: None, nn.ModuleList(), {}, "text", 3])
def test_what_nobody_knows_how_to_drive(prepared: Any) -> None:
    assert steps_of(prepared, model_of()) is None
    assert steps_of([lambda: None]) is None
