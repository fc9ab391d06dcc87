"""A Lightning classifier recorded by one added line, then asked why it errs. Runs offline in seconds on one core.

Three kinds of points; somebody labelled a corner of the first kind wrongly. The model errs there, and the recording
knows which training examples taught it to:

    python examples/lightning_classifier.py [ledger]
"""

from __future__ import annotations

import logging
import sys
import tempfile
import warnings

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import trainer_attrib as ta
from trainer_attrib.integrations.lightning import AttributionCallback

CENTERS = torch.tensor([[0.0, 2.0], [2.0, -1.0], [-2.0, -1.0]])
CORNER = torch.tensor([0.0, 3.6])


class Classifier(pl.LightningModule):
    """Two layers; the training step is the usual one."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 3))

    def forward(self, x: Tensor) -> Tensor:
        """Logits [B, 3] of points [B, 2]."""
        return self.net(x)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """The loss of a batch."""
        return nn.functional.cross_entropy(self.net(batch["x"]), batch["y"])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW."""
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


def points(count: int) -> list[dict[str, object]]:
    """Labelled points; those in the corner are labelled 1 although they are of kind 0."""
    examples: list[dict[str, object]] = []
    for i in range(count):
        wrong = i % 20 == 0
        kind = 0 if wrong else i % 3
        center = CORNER if wrong else CENTERS[kind]
        x = center + torch.randn(2) * (0.2 if wrong else 0.5)
        examples.append({"id": f"{'wrong' if wrong else 'right'}-{i}", "x": x, "y": 1 if wrong else kind})
    return examples


def main(ledger: str) -> None:
    """Train, then ask."""
    pl.seed_everything(0, verbose=False)
    model, data = Classifier(), points(600)
    trainer = pl.Trainer(
        max_epochs=10,
        callbacks=[AttributionCallback(ledger, stage="first")],  # the added line
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, DataLoader(data, batch_size=30, shuffle=True))

    query = CORNER + torch.tensor([[0.1, 0.0]])
    error = ta.Behavior.margin("takes the corner for kind 1", query, torch.tensor([1]))
    print(f"logit margin of kind 1 in the corner: {float(error.values(model)[0]):+.1f} (kind 0 would be right)")
    top = ta.Analyzer(ledger, model).influence([error]).top(10)["example"].to_pylist()
    print("examples that taught it so:", *top)
    found = sum(name.startswith("wrong") for name in top)
    print(
        f"{found} of these 10 are wrongly labelled; of all examples {sum('wrong' in str(e['id']) for e in data)} of 600"
    )


if __name__ == "__main__":
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    main(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp())
