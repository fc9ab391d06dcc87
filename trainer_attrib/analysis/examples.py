"""Training examples that are given to the analyzer, with the loss that each was (or will be) trained by."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer_attrib.analysis.behavior import Measure, zipped
from trainer_attrib.analysis.text import (
    TextPair,
    encode_pair,
    encode_text,
    pieces,
    sampled_losses,
    text_losses,
    token_losses,
)
from trainer_attrib.errors import ConfigurationError

FisherLosses = Callable[[nn.Module, list[Any], torch.Generator], Iterator[Tensor]]
"""(model, items, random numbers) -> a few losses [len(items)], whose gradients' outer products add up, in expectation,
to the curvature of each item's loss: the Gauss-Newton matrix, which is the Fisher information of the model's own
predictions (Martens 2020, "New insights and perspectives on the natural gradient method", section 5)."""
FEW_CLASSES = 16


@dataclass(frozen=True)
class TokenLosses:
    """What the tokens of examples have to do with their losses.

    Args:
        losses: parts by token, [len(items), S]; a row adds up to the example's loss, and is 0 beyond its tokens.
        pieces: item -> how its tokens are shown, one string each.
    """

    losses: Measure
    pieces: Callable[[Any], list[str]]


@dataclass(frozen=True)
class Examples:
    """Examples by id, and their losses.

    Args:
        dataset: one item per example.
        loss: losses of some items, [len(items)], each of its own example alone, as training defined it.
        ids: of the examples, unique; to match what was recorded, those of the training set.
        texts: how each is shown.
        sources: where each comes from.
        lengths: of the items, by which batches are sorted so that little is padded.
        fisher: for curvature. None: outer products of the losses' own gradients stand in for it.
        batch_size: items in one forward pass.
        tokens: for scores of single tokens.

    Raises:
        ConfigurationError: no examples, columns of different lengths, or two with the same id.
    """

    dataset: Sequence[Any]
    loss: Measure
    ids: Sequence[str] = ()
    texts: Sequence[str | None] = ()
    sources: Sequence[str | None] = ()
    lengths: Sequence[int] = ()
    fisher: FisherLosses | None = None
    batch_size: int = 32
    tokens: TokenLosses | None = None

    def __post_init__(self) -> None:
        count = len(self.dataset)
        for name, filler in (("ids", None), ("texts", None), ("sources", None), ("lengths", 0)):
            given = list(getattr(self, name)) or ([str(i) for i in range(count)] if name == "ids" else [filler] * count)
            object.__setattr__(self, name, given)
            if len(given) != count:
                raise ConfigurationError(
                    f"Examples got {count} items but {len(given)} {name}.", fix=f"pass one of `{name}` per item."
                )
        object.__setattr__(self, "ids", [str(i) for i in self.ids])
        if count == 0 or len(set(self.ids)) < count:
            raise ConfigurationError(
                f"Examples got {count} items with {len(set(self.ids))} different ids.",
                cause="the ids name what the examples say, or the data set is empty.",
                fix="pass ids that are unique, such as row numbers: equal examples stay two examples.",
            )

    def __len__(self) -> int:
        return len(self.dataset)

    def batches(self) -> list[list[int]]:
        """Positions of the examples, batch by batch, those of similar length together."""
        order = sorted(range(len(self)), key=lambda i: (-self.lengths[i], i))
        return [order[i : i + self.batch_size] for i in range(0, len(order), self.batch_size)]

    def drawn(self, count: int, generator: torch.Generator) -> list[list[int]]:
        """Positions of at most so many examples drawn at random, batch by batch."""
        order = torch.randperm(len(self), generator=generator)[:count].tolist()
        return [order[i : i + self.batch_size] for i in range(0, len(order), self.batch_size)]

    def some(self, positions: Sequence[int]) -> Examples:
        """The examples at these positions."""
        columns = {name: [getattr(self, name)[i] for i in positions] for name in ("ids", "texts", "sources", "lengths")}
        return replace(self, dataset=self.items(positions), **columns)

    def items(self, positions: Sequence[int]) -> list[Any]:
        """The items at these positions."""
        return [self.dataset[i] for i in positions]

    @staticmethod
    def of_texts(
        texts: Sequence[str],
        tokenizer: Any,
        *,
        ids: Sequence[str] = (),
        sources: Sequence[str | None] = (),
        batch_size: int = 32,
    ) -> Examples:
        """Texts for a causal language model: mean next-token loss of each."""
        items = [encode_text(tokenizer, text) for text in texts]
        return _of_tokens(tokenizer, items, list(texts), ids, sources, batch_size)

    @staticmethod
    def of_pairs(
        prompts: Sequence[str],
        completions: Sequence[str],
        tokenizer: Any,
        *,
        ids: Sequence[str] = (),
        sources: Sequence[str | None] = (),
        batch_size: int = 32,
    ) -> Examples:
        """Completions after their prompts: mean loss of each completion's tokens."""
        items = [encode_pair(tokenizer, p, c) for p, c in zipped("Examples", prompts, completions)]
        texts = [p + c for p, c in zip(prompts, completions, strict=True)]
        return _of_tokens(tokenizer, items, texts, ids, sources, batch_size)

    @staticmethod
    def of_classes(
        inputs: Tensor,
        labels: Any,
        *,
        ids: Sequence[str] = (),
        sources: Sequence[str | None] = (),
        batch_size: int = 64,
    ) -> Examples:
        """Inputs of a classifier: cross-entropy of each.

        Args:
            inputs: [N, ...], passed to the model.
            labels: integers [N].
            ids: of the examples.
            sources: where each comes from.
            batch_size: items in one forward pass.
        """
        labels = torch.as_tensor(labels)
        items = [(inputs[i], labels[i]) for i in range(len(labels))]
        texts = [f"class {int(label)}" for label in labels]
        return Examples(items, _class_losses, ids, texts, sources, (), _class_fisher, batch_size)


def _of_tokens(
    tokenizer: Any,
    items: list[TextPair],
    texts: list[str],
    ids: Sequence[str],
    sources: Sequence[str | None],
    batch_size: int,
) -> Examples:
    lengths = [len(item.tokens) for item in items]
    tokens = TokenLosses(token_losses, partial(pieces, tokenizer))
    return Examples(items, text_losses, ids, texts, sources, lengths, _token_fisher, batch_size, tokens)


def _token_fisher(model: nn.Module, items: list[Any], generator: torch.Generator) -> Iterator[Tensor]:
    yield sampled_losses(model, items, generator)


def _class_losses(model: nn.Module, items: list[Any]) -> Tensor:
    logits, labels = _logits(model, items)
    return F.cross_entropy(logits, labels, reduction="none")


def _class_fisher(model: nn.Module, items: list[Any], generator: torch.Generator) -> Iterator[Tensor]:
    """Every class, weighted by the root of its probability, if there are few; else one drawn by the model."""
    logits = _logits(model, items)[0].log_softmax(1)
    classes = logits.shape[1]
    if classes > FEW_CLASSES:
        drawn = torch.multinomial(logits.detach().exp().cpu(), 1, generator=generator).to(logits.device)
        yield -logits.gather(1, drawn)[:, 0]
        return
    for label in range(classes):
        logits = logits if label == 0 else _logits(model, items)[0].log_softmax(1)
        yield -logits[:, label] * logits[:, label].detach().mul(0.5).exp()


def _logits(model: nn.Module, items: list[Any]) -> tuple[Tensor, Tensor]:
    device = next(model.parameters()).device
    output = model(torch.stack([x for x, _ in items]).to(device))
    return getattr(output, "logits", output), torch.stack([label for _, label in items]).to(device)
