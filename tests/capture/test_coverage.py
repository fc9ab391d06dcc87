"""What the rows cannot stand for is left out of them and named."""

from __future__ import annotations

import torch
from torch import nn

from trainer_attrib import Ledger, Recorder


class ScaledEmbedding(nn.Embedding):
    """As Gemma's: a subclass of a known layer that computes something else."""

    def forward(self, x):
        return super().forward(x) * 8.0


class Model(nn.Module):
    def __init__(self, embedding):
        super().__init__()
        self.embedding, self.body, self.middle, self.head = embedding, nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.middle(self.body(self.embedding(x)).tanh()).tanh())


def coverage_of(path, embedding):
    torch.manual_seed(0)
    model = Model(embedding)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Recorder(path, stage="one", model=model, optimizer=optimizer, strict=True):
        model(torch.arange(10).view(5, 2)).logsumexp(-1).mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.01)
        optimizer.step()
    return Ledger(path).stage("one").meta["coverage"]


def test_a_layer_that_scales_its_output_is_found_by_its_scale(tmp_path):
    """Its residual is zero, since a regression absorbs any factor; but clipping scales every weight alike."""
    partial = coverage_of(tmp_path / "scaled", ScaledEmbedding(10, 6))["partial"]
    assert list(partial) == ["embedding.weight"]
    assert "is 8 times what" in partial["embedding.weight"]


def test_an_ordinary_layer_is_covered(tmp_path):
    coverage = coverage_of(tmp_path / "plain", nn.Embedding(10, 6))
    assert coverage["partial"] == {}
    assert coverage["share"] == 1.0
