"""Which training examples are labelled wrongly? A classifier is trained on images of which some have a wrong label;
self-influence, how much training on an example changed that very example, finds them without a look at clean labels.
Accuracy on clean test images: trained on everything, without the first examples of that ranking, without as many random
ones, and without the wrong labels themselves, which nobody knows. Mean over seeds, with its standard error.

    python examples/clean_mislabelled.py [--seeds 3] [--epochs 30]

Needs nothing beside the package; the images are drawn here. About twenty seconds.
"""

from __future__ import annotations

import argparse
import tempfile
from contextlib import nullcontext

import numpy as np
import torch
from torch import Tensor, nn

import trainer_attrib as ta
from trainer_attrib.evaluation.detection import detection

KINDS, SIDE, TRAIN, TEST, WRONG = 10, 8, 600, 2000, 0.15


def images(count: int, seed: int, shapes: Tensor) -> tuple[Tensor, Tensor]:
    """Noisy copies of ten shapes, [count, SIDE * SIDE], and which shape each is."""
    draw = torch.Generator().manual_seed(seed)
    labels = torch.randint(KINDS, (count,), generator=draw)
    return shapes[labels] + 1.5 * torch.randn(count, SIDE * SIDE, generator=draw), labels


def train(x: Tensor, y: Tensor, kept: np.ndarray, epochs: int, ledger: str | None = None) -> nn.Module:
    """A small network, recorded if there is a ledger."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(SIDE * SIDE, 128), nn.ReLU(), nn.Linear(128, KINDS))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
    recorder = ta.Recorder(ledger, stage="training", model=model, optimizer=optimizer) if ledger else None
    with recorder or nullcontext():
        for _ in range(epochs):
            for rows in torch.from_numpy(np.random.default_rng(0).permutation(kept)).split(50):
                with recorder.batch(ids=[str(n) for n in rows.tolist()]) if recorder else nullcontext():
                    nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
                optimizer.step()
                optimizer.zero_grad()
    return model


def one_seed(seed: int, epochs: int) -> list[float]:
    """AUC of finding the wrong labels, the share of them found, and four accuracies."""
    shapes = torch.randn(KINDS, SIDE * SIDE, generator=torch.Generator().manual_seed(100 + seed))
    (x, clean), (x_test, y_test) = images(TRAIN, seed, shapes), images(TEST, 50 + seed, shapes)
    draw = np.random.default_rng(seed)
    wrong = draw.random(TRAIN) < WRONG
    y = torch.where(torch.from_numpy(wrong), (clean + torch.from_numpy(draw.integers(1, KINDS, TRAIN))) % KINDS, clean)
    everything = np.arange(TRAIN)
    with tempfile.TemporaryDirectory() as ledger:
        model = train(x, y, everything, epochs, ledger)
        ranking = ta.Analyzer(ledger, model).self_influence()
    score = {int(row.example): row.score for row in ranking.rows}
    first = np.array([int(row.example) for row in ranking.top(int(WRONG * TRAIN))])
    found = detection(np.array([score[n] for n in everything]), wrong)
    random = draw.choice(TRAIN, len(first), replace=False)
    accuracies = []
    for dropped in ([], first, random, everything[wrong]):
        again = train(x, y, np.setdiff1d(everything, dropped), epochs)
        accuracies.append(float((again(x_test).argmax(1) == y_test).float().mean()))
    return [found.auc.value, float(wrong[first].sum() / wrong.sum()), *accuracies]


def main() -> None:
    """All seeds, one table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=30)
    options = parser.parse_args()
    found = np.array([one_seed(seed, options.epochs) for seed in range(options.seeds)])
    error = found.std(0, ddof=1) / len(found) ** 0.5 if len(found) > 1 else np.full(found.shape[1], np.nan)
    names = [
        "AUC of self-influence for wrong labels (0.5: by chance)",
        f"wrong labels among the first {int(WRONG * TRAIN)} of {TRAIN}",
        "accuracy, trained on everything", "accuracy, without the first ones", "accuracy, without as many random ones",
        "accuracy, without all wrong labels",
    ]  # fmt: skip
    print(f"{options.seeds} seeds, about {WRONG:.0%} of {TRAIN} labels wrong")
    for name, mean, bar in zip(names, found.mean(0), error, strict=True):
        print(f"{name:58} {mean:.3f} ± {bar:.3f}")


if __name__ == "__main__":
    main()
