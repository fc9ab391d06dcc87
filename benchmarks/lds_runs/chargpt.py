"""A character-level GPT (2 layers of width 64) on 1024 windows of prose, asked about 64 others.

AdamW 3e-3, weight decay 0.01, cosine schedule, batches of 32 for 12 epochs, with and without a warm-up. The recorded
training is transformers' Trainer; retrainings are the same steps in a plain loop. The behavior of a query is the mean
log-probability of its next characters. Truth: 48 random halves, two independent trainings of each.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lds_runs import prose
from lds_runs.chargpt_model import BATCH, DECAY, EPOCHS, RATE, WARMUP, CharGPT, losses, optimizing, train
from lds_runs.testbed import RANK, SNAPSHOTS, STAGE, Trained, Truth, kept, restore, subsets
from trainer_attrib import Behavior, Examples, Ledger, SketchConfig

HALVES, REPEATS = 48, 2


@cache
def ids() -> list[str]:
    """Topic and number of each training window."""
    return [f"{prose.source(window)}-{window}" for window in prose.split()[0]]


def model(seed: int) -> CharGPT:
    """New weights."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return CharGPT(len(prose.alphabet()), prose.WINDOW)


def train_plainly(config: str, seed: int, rows: np.ndarray | None = None) -> nn.Module:
    """A training on these windows, all by default, without a recording."""
    windows = prose.codes()[0]
    net = model(seed)
    train(net, windows if rows is None else windows[torch.from_numpy(rows)], seed, config)
    return net.eval()


def behavior() -> Behavior:
    """Mean log-probability of the next characters of each query."""
    queries = [prose.texts()[window] for window in prose.split()[1]]
    return Behavior("log-probability", list(prose.codes()[1]), _measure, queries, unit="nats per character")


def examples(run: Trained) -> Examples:
    """The windows of a training, with curvature from characters that the model draws itself."""
    return Examples(list(run.train[0]), _losses, ids=run.ids, fisher=_drawn, batch_size=64)


def trained(config: str, seed: int, cache: Path, dtype: str = "float16") -> Trained:
    """The recorded training, run unless the folder holds it."""
    ledger, net = cache / f"{config}-{seed}-{prose.fingerprint()}", model(seed)
    if not (ledger / "done").exists():
        _trainer(net, config, seed, ledger, dtype).train()
        (ledger / "done").touch()
    train, test = prose.codes()
    weights = Ledger(ledger).stage(STAGE).snapshot("end")
    return Trained(config, seed, restore(net, weights), ledger, ids(), (train,), (test,), losses, behavior())


def ground_truth(config: str, cache: Path, halves: int = HALVES) -> Truth:
    """Behavior of the queries after training on halves; values [halves, 2, 64]."""
    deciding = [prose.fingerprint(), BATCH, EPOCHS, RATE, DECAY, WARMUP[config], HALVES, REPEATS, halves]
    return kept(cache, f"{config}-half", deciding, lambda: _halves(config, halves))


def _halves(config: str, count: int) -> Truth:
    masks = subsets(count, len(prose.codes()[0]), 0.5, seed=1)
    asked, values = behavior(), np.zeros((count, REPEATS, len(prose.codes()[1])), np.float32)
    for repeat in range(REPEATS):
        for subset, mask in enumerate(masks):
            net = train_plainly(config, 1_000_000 + 1000 * subset + repeat, np.flatnonzero(mask))
            values[subset, repeat] = asked.values(net).numpy()
    return Truth(masks, values)


def _trainer(net: nn.Module, config: str, seed: int, ledger: Path, dtype: str) -> Any:
    from datasets import Dataset
    from transformers import PrinterCallback, Trainer, TrainingArguments, default_data_collator

    from trainer_attrib.integrations.huggingface import AttributionCallback

    codes = prose.codes()[0].tolist()
    sources = [prose.source(window) for window in prose.split()[0]]
    rows = Dataset.from_dict({"input_ids": codes, "labels": codes, "id": ids(), "source": sources})
    arguments = TrainingArguments(
        tempfile.gettempdir(), per_device_train_batch_size=BATCH, num_train_epochs=EPOCHS, max_grad_norm=0.0,
        seed=seed, data_seed=seed, use_cpu=True, dataloader_pin_memory=False, report_to="none", save_strategy="no",
        logging_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    sketch = SketchConfig(rank=RANK, dtype=dtype)
    callback = AttributionCallback(ledger, stage=STAGE, sketch=sketch, snapshots=SNAPSHOTS, strict=True)
    trainer = Trainer(
        model=net, args=arguments, train_dataset=rows, data_collator=default_data_collator, callbacks=[callback],
        optimizers=optimizing(net, EPOCHS * (len(codes) // BATCH), config),
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    return trainer


def _measure(model: nn.Module, items: list[Tensor]) -> Tensor:
    return -losses(model, (torch.stack(items),))


def _losses(model: nn.Module, items: list[Tensor]) -> Tensor:
    return losses(model, (torch.stack(items),))


def _drawn(model: nn.Module, items: list[Tensor], generator: torch.Generator) -> Iterator[Tensor]:
    """Losses of drawn characters, over the root of how many there are: a window's loss is the mean over characters."""
    logits = model(torch.stack(items))[:, :-1]
    drawn = torch.multinomial(logits.detach().softmax(-1).flatten(0, 1), 1, generator=generator).view(logits.shape[:2])
    losses_BS = nn.functional.cross_entropy(logits.transpose(1, 2), drawn, reduction="none")
    yield losses_BS.sum(1) / drawn.shape[1] ** 0.5
