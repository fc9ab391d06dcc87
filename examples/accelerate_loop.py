"""A loop of one's own with accelerate, recorded by `ta.Recorder`, then asked why the model errs; the same script in one
process or several, each of which records its part of every batch. Offline, in seconds.

Three kinds of points; somebody labelled a corner of the first kind wrongly.

    python examples/accelerate_loop.py [ledger]
    torchrun --nproc-per-node 2 examples/accelerate_loop.py [ledger]
"""

from __future__ import annotations

import os
import sys
import tempfile

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, set_seed
from torch import Tensor, nn
from torch.utils.data import DataLoader

import trainer_attrib as ta

CENTERS = torch.tensor([[0.0, 2.0], [2.0, -1.0], [-2.0, -1.0]])
CORNER = torch.tensor([0.0, 3.6])


def points(count: int) -> list[dict[str, object]]:
    """Labelled points with a name each; one in twenty lies in the corner and is labelled 1 instead of 0."""
    examples: list[dict[str, object]] = []
    for i in range(count):
        wrong = i % 20 == 0
        kind = 0 if wrong else i % 3
        x = (CORNER if wrong else CENTERS[kind]) + torch.randn(2) * (0.2 if wrong else 0.5)
        examples.append({"id": f"{'wrong' if wrong else 'right'}-{i}", "x": x, "y": 1 if wrong else kind})
    return examples


def train(ledger: str, accelerator: Accelerator) -> nn.Module:
    """Ten epochs of 60 points per step: two micro-batches in one process, or one in each of two."""
    model = nn.Sequential(nn.Linear(2, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 3))
    loader = DataLoader(points(600), batch_size=30, shuffle=True)  # type: ignore[arg-type]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

    with ta.Recorder(ledger, stage="first", model=model, optimizer=optimizer) as recorder:  # added, after prepare
        for epoch in range(10):
            recorder.epoch = epoch  # optional: rows then say which epoch they are of
            for batch in loader:
                with (
                    accelerator.accumulate(model),
                    recorder.batch(ids=batch["id"]),
                ):  # added: what each example is called
                    loss = nn.functional.cross_entropy(model(batch["x"]), batch["y"])
                    accelerator.backward(loss)
                    optimizer.step()
                    optimizer.zero_grad()
    return accelerator.unwrap_model(model)


def ask(ledger: str, model: nn.Module) -> list[str]:
    """The ten examples that most made the model take the corner for kind 1."""
    query: Tensor = CORNER + torch.tensor([[0.1, 0.0]])
    error = ta.Behavior.margin("takes the corner for kind 1", query, torch.tensor([1]))
    print(f"logit margin of kind 1 in the corner: {float(error.values(model)[0]):+.1f} (kind 0 would be right)")
    return ta.Analyzer(ledger, model).influence([error]).top(10)["example"].to_pylist()


def main(ledger: str) -> None:
    """Train, then ask."""
    set_seed(0)
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=max(1, 2 // processes))
    [ledger] = broadcast_object_list([ledger])  # the first process's, if each made a folder of its own
    model = train(ledger, accelerator)
    if accelerator.is_main_process:
        ranks = {row["rank"] for block in ta.Ledger(ledger).stage("first").rows() for row in block.table.to_pylist()}
        print(f"recorded by {len(ranks)} of {accelerator.num_processes} processes")
        top = ask(ledger, model)
        print("examples that taught it so:", *top)
        print(f"{sum(name.startswith('wrong') for name in top)} of these 10 are wrongly labelled; of all, 30 of 600")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp())
