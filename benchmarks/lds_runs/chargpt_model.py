"""A character-level transformer that needs nothing but torch, so that every peer can load it."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

LAYERS, WIDTH, HEADS = 2, 64, 4
BATCH, EPOCHS, RATE, DECAY = 32, 12, 3e-3, 0.01
# Share of the steps in which the learning rate rises. At its full rate from the start it is more a matter of luck how
# well a training goes at all, and trainings on one half of the data agree less (docs/log.md).
WARMUP = {"chargpt": 0.0, "chargpt warmed up": 0.1}


class Block(nn.Module):
    """Attention and a perceptron, each after a normalisation and added to the stream."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, stream: Tensor) -> Tensor:
        """[B, S, WIDTH] to the same."""
        batch, length, _ = stream.shape
        heads = self.qkv(self.norm1(stream)).reshape(batch, length, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        mixed = scaled_dot_product_attention(heads[0], heads[1], heads[2], is_causal=True)
        stream = stream + self.out(mixed.transpose(1, 2).reshape(batch, length, WIDTH))
        return stream + self.down(nn.functional.gelu(self.up(self.norm2(stream))))


class CharGPT(nn.Module):
    """Two blocks of width 64 over characters, untied head, no dropout."""

    def __init__(self, vocabulary: int, length: int) -> None:
        super().__init__()
        self.characters, self.places = nn.Embedding(vocabulary, WIDTH), nn.Embedding(length, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, vocabulary, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Any:
        """Logits [B, S, V]; with labels (the characters themselves), a dict of them and the mean loss of the next."""
        places = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
        stream = self.characters(input_ids) + self.places(places)
        for block in self.blocks:
            stream = block(stream)
        logits = self.head(self.norm(stream))
        if labels is None:
            return logits
        return {"loss": cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()), "logits": logits}


def losses(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
    """Mean cross entropy of the next character in each window, nats, [B]."""
    return next_losses(model(batch[0]), batch[0])


def next_losses(logits: Tensor, windows: Tensor) -> Tensor:
    """The same from logits [B, S, V] and windows [B, S]."""
    return cross_entropy(logits[:, :-1].transpose(1, 2), windows[:, 1:], reduction="none").mean(1)


def optimizing(
    model: nn.Module, steps: int, config: str
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LambdaLR]:
    """Optimizer and schedule of a training of so many steps: a line upwards, if any, and a cosine downwards."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=DECAY)
    rising = round(WARMUP[config] * steps)

    def factor(t: int) -> float:
        return (t + 1) / rising if t < rising else 0.5 * (1 + math.cos(math.pi * (t - rising) / (steps - rising)))

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def train(model: nn.Module, windows: Tensor, seed: int, config: str) -> None:
    """All steps on the windows [N, S]; the seed decides their order."""
    generator = torch.Generator().manual_seed(seed)
    optimizer, schedule = optimizing(model, EPOCHS * (len(windows) // BATCH), config)
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(windows), generator=generator).split(BATCH):
            losses(model, (windows[rows],)).mean().backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
