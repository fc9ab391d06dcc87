"""Which tenth of the labels is wrong? Self-influence, influence on clean examples, and losses, on two image sets.

Digits of scikit-learn (1000) and Fashion-MNIST (2000, halved to 14 x 14), 10 % of the labels flipped to another class
at random; a perceptron with 64 hidden units is trained by AdamW for 15 epochs and recorded. Figures are means over
seeds with their standard errors. The rows of TracIn are captum's formula (Pruthi et al. 2020, equation 1, the sum over
checkpoints of learning rate times inner product), computed here with exact gradients, not by captum itself.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import report
import torch
from offline_data import fashion_mnist
from stage_runs.digits import images as digit_images
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.functional import avg_pool2d, cross_entropy

from trainer_attrib import Analyzer, Behavior, Examples, Ledger, Recorder, SketchConfig
from trainer_attrib.evaluation.adapters import scores_of
from trainer_attrib.evaluation.detection import detection

EPOCHS, BATCH, RATE, VALIDATION, SHARE = 15, 50, 2e-3, 100, 0.1
PEERS = tuple(f"{name}, {what}" for name in ("gradient dot", "TracIn") for what in ("self", "validation"))


def main() -> None:
    options = report.parser((__doc__ or "").splitlines()[0]).parse_args()
    seeds = options.seeds or (1 if options.quick else 3)
    rows, checks = [], {}
    for name in ("digits", "Fashion-MNIST"):
        runs = [measured(name, seed) for seed in range(seeds)]
        means = {}
        for method in runs[0]:
            figures = np.array([run[method] for run in runs])
            error = figures.std(0, ddof=1) / np.sqrt(seeds) if seeds > 1 else np.full(2, np.nan)
            means[method] = float(figures[:, 0].mean())
            rows.append({"data": name, "method": method, "AUC": round(means[method], 4), "AUC ±": round(error[0], 4),
                         "AP": round(figures[:, 1].mean(), 4), "AP ±": round(error[1], 4)})  # fmt: skip
        best = max(means[peer] for peer in PEERS)
        for method in ("fisher, self", "gauss_newton, self", "leave_one_out, self", "gauss_newton, validation"):
            checks[f"{name}: {method}, beside all TracIn and dot"] = report.check(means[method], best, most=False)
        held = report.check(means["leave_one_out, self"], means["loss"], most=False)
        checks[f"{name}: leave_one_out, self, beside the loss"] = held
        like = max(means[peer] for peer in PEERS if peer.endswith("validation"))
        held = report.check(means["gauss_newton, validation"], like, most=False)
        checks[f"{name}: gauss_newton, validation, beside those on validation examples"] = held
    report.publish("mislabel", rows, checks, quick=options.quick, notes=[f"{seeds} seeds"])


def measured(name: str, seed: int) -> dict[str, tuple[float, float]]:
    """AUC and average precision of every method on one training."""
    inputs, labels, wrong, asked = data(name, seed)
    ids = [f"example-{n}" for n in range(len(inputs))]
    with tempfile.TemporaryDirectory() as folder:
        model = trained(inputs, labels, ids, seed, Path(folder, "ledger"))
        found = ours(Path(folder, "ledger"), model, (inputs, labels), asked, ids)
        found |= exact(Path(folder, "ledger"), model, (inputs, labels), asked)
    found["random"] = np.random.default_rng(seed).random(len(ids))
    held = {method: detection(suspicion, wrong) for method, suspicion in found.items()}
    return {method: (d.auc.value, d.average_precision.value) for method, d in held.items()}


def data(name: str, seed: int) -> tuple[Tensor, Tensor, np.ndarray, tuple[Tensor, Tensor]]:
    """Inputs, labels of which some are wrong, which these are; and clean examples to ask about."""
    if name == "digits":
        pixels, classes = digit_images()
        images, truth, count = pixels.flatten(1), classes.numpy(), 1000
    else:
        raw, truth = fashion_mnist("train")
        raw, truth, count = raw[:10000], truth[:10000], 2000
        images = avg_pool2d(torch.tensor(raw / 255, dtype=torch.float32)[:, None], 2).flatten(1)
    draw = np.random.default_rng(seed)
    order = draw.permutation(len(images))
    known, held_out = order[:count], order[count : count + VALIDATION]
    wrong = np.zeros(count, bool)
    wrong[draw.permutation(count)[: round(SHARE * count)]] = True
    labels = np.where(wrong, (truth[known] + draw.integers(1, 10, count)) % 10, truth[known])
    return images[known], torch.tensor(labels), wrong, (images[held_out], torch.tensor(truth[held_out]))


def trained(inputs: Tensor, labels: Tensor, ids: list[str], seed: int, ledger: Path) -> nn.Module:
    """The recorded model."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(inputs.shape[1], 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    steps = EPOCHS * len(ids) // BATCH
    with Recorder(ledger, stage="train", model=model, optimizer=optimizer, sketch=SketchConfig(rank=16),
                  snapshots=4, total_steps=steps) as recorder:  # fmt: skip
        for _ in range(EPOCHS):
            for rows in torch.randperm(len(ids)).split(BATCH):
                with recorder.batch(ids=[ids[n] for n in rows]):
                    cross_entropy(model(inputs[rows]), labels[rows]).backward()
                optimizer.step()
                optimizer.zero_grad()
    return model.eval()


def ours(
    ledger: Path, model: nn.Module, known: tuple[Tensor, Tensor], asked: tuple[Tensor, Tensor], ids: list[str]
) -> dict[str, np.ndarray]:
    """Minus the influence on clean examples' margins, and self-influence from captured rows and given examples."""
    analyzer, found = Analyzer(ledger, model), {}
    margins, examples = Behavior.margin("margin", *asked), Examples.of_classes(*known, ids=ids)
    for recipe in ("gauss_newton", "fisher", "trackstar", "grad_dot", "grad_cos", "tracin"):
        given = {"train": examples} if recipe == "gauss_newton" else None
        influence = analyzer.influence([margins], recipe=recipe, data=given, controls=())
        found[f"{recipe}, validation"] = -scores_of(influence, ids).mean(0)
    for metric in ("fisher", "plain", "gauss_newton", "leave_one_out"):
        own = {row.example: row.score for row in analyzer.self_influence("train", metric, {"train": examples}).rows}
        found[f"{metric}, self"] = np.array([own[name] for name in ids])
    return found


def exact(
    ledger: Path, model: nn.Module, known: tuple[Tensor, Tensor], asked: tuple[Tensor, Tensor]
) -> dict[str, np.ndarray]:
    """Loss, gradient norm, and gradient dot and TracIn over the snapshots with whole gradients."""

    def loss(weights: dict[str, Tensor], pixels: Tensor, label: Tensor) -> Tensor:
        return cross_entropy(functional_call(model, weights, (pixels[None],)), label[None])

    def both(weights: dict[str, Tensor]) -> tuple[np.ndarray, np.ndarray]:
        own, asks = (vmap(grad(loss), (None, 0, 0))(weights, *part) for part in (known, asked))
        squared = sum(g.flatten(1).square().sum(1) for g in own.values())
        helps = sum(own[name].flatten(1) @ asks[name].flatten(1).mean(0) for name in own)
        return squared.numpy(), helps.numpy()

    reader = Ledger(ledger).stage("train")
    names = [snapshot["name"] for snapshot in reader.meta["snapshots"] if snapshot["step"]]
    states = [both({n: w.detach() for n, w in reader.snapshot(name).items()}) for name in names]
    final = {name: weight.detach() for name, weight in model.named_parameters()}
    squared, helps = both(final)
    found = {"loss": vmap(loss, (None, 0, 0))(final, *known).numpy(), "gradient norm": np.sqrt(squared)}
    found |= {"gradient dot, self": squared, "gradient dot, validation": -helps}
    # The learning rate is constant, so it changes no order.
    return found | {"TracIn, self": sum(s for s, _ in states), "TracIn, validation": -sum(h for _, h in states)}


if __name__ == "__main__":
    main()
