"""Measurements of causal language models: losses of texts, log-probabilities of completions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer_attrib.errors import BehaviorError

IGNORED = -100


@dataclass(frozen=True)
class TextPair:
    """Token ids of a text and the labels of the tokens that count."""

    tokens: tuple[int, ...]
    labels: tuple[int, ...]


def encode_text(tokenizer: Any, text: str) -> TextPair:
    """A text of which every token after the first counts."""
    tokens = tuple(tokenizer(text)["input_ids"])
    return _checked(TextPair(tokens, tokens), text)


def encode_pair(tokenizer: Any, prompt: str, completion: str) -> TextPair:
    """A prompt and its completion, of which only the completion's tokens count.

    The two are tokenised together, as in training, and split where the prompt's own tokens end; where a token spans
    the border, it counts as completion.
    """
    tokens = list(tokenizer(prompt + completion)["input_ids"])
    alone = list(tokenizer(prompt)["input_ids"])
    shared = 0
    while shared < min(len(alone), len(tokens)) and alone[shared] == tokens[shared]:
        shared += 1
    labels = [IGNORED] * shared + tokens[shared:]
    return _checked(TextPair(tuple(tokens), tuple(labels)), prompt + completion)


def completion_logprobs(model: nn.Module, items: Sequence[TextPair]) -> Tensor:
    """Log-probability of each item's counted tokens, summed, [N] in nats."""
    return token_logprobs(model, items).sum(1)


def token_logprobs(model: nn.Module, items: Sequence[TextPair]) -> Tensor:
    """Log-probabilities [N, S-1] of the tokens after the first, zero where one does not count."""
    logprobs, _ = _token_logprobs(model, items)
    return logprobs


def text_losses(model: nn.Module, items: Sequence[TextPair]) -> Tensor:
    """Mean negative log-probability of each item's counted tokens, [N] in nats per token."""
    logprobs, counts = _token_logprobs(model, items)
    return -logprobs.sum(1) / counts


def token_losses(model: nn.Module, items: Sequence[TextPair]) -> Tensor:
    """What each token has to do with :func:`text_losses`: its own loss over the number of tokens that count, [N, S]; a
    row adds up to the item's loss. 0 for tokens that do not count, the first and padding among them."""
    logprobs, counts = _token_logprobs(model, items)
    return F.pad(-logprobs / counts[:, None], (1, 0))


def pieces(tokenizer: Any, item: TextPair) -> list[str]:
    """The text that each token adds to those before it, special tokens included. A character that takes several tokens
    belongs to the last of them."""
    shown, found = "", []
    for end in range(1, len(item.tokens) + 1):
        text = tokenizer.decode(list(item.tokens[:end]), clean_up_tokenization_spaces=False)
        unfinished = text.endswith("\ufffd") and end < len(item.tokens)
        found.append("" if unfinished else text[len(shown) :])
        shown = shown if unfinished else text
    return found


def sampled_losses(model: nn.Module, items: Sequence[TextPair], generator: torch.Generator) -> Tensor:
    """Losses of tokens that the model itself draws at the places that count, divided by the root of their number: the
    outer product of the gradient of each is, in expectation, the curvature of the mean loss of its item. [N]."""
    logits, labels = next_token_logits(model, items)
    counted = labels != IGNORED
    probabilities = logits.detach().softmax(-1)[counted]
    drawn = torch.full_like(labels, IGNORED)
    drawn[counted] = torch.multinomial(probabilities.cpu(), 1, generator=generator)[:, 0].to(labels.device)
    losses = F.cross_entropy(logits.transpose(1, 2), drawn, ignore_index=IGNORED, reduction="none")
    return losses.sum(1) / counted.sum(1).sqrt()


def _token_logprobs(model: nn.Module, items: Sequence[TextPair]) -> tuple[Tensor, Tensor]:
    """Log-probabilities [N, S-1], zero where a token does not count, and counts [N]."""
    logits, labels = next_token_logits(model, items)
    losses = F.cross_entropy(logits.transpose(1, 2), labels, ignore_index=IGNORED, reduction="none")
    return -losses, (labels != IGNORED).sum(1)


def next_token_logits(model: nn.Module, items: Sequence[TextPair]) -> tuple[Tensor, Tensor]:
    """Logits [N, S-1, V] and what they should predict, [N, S-1]. Padded on the right."""
    device = next(model.parameters()).device
    length = max(len(item.tokens) for item in items)
    tokens = torch.tensor([item.tokens + (0,) * (length - len(item.tokens)) for item in items], device=device)
    labels = torch.tensor([item.labels + (IGNORED,) * (length - len(item.labels)) for item in items], device=device)
    mask = torch.tensor([[1] * len(i.tokens) + [0] * (length - len(i.tokens)) for i in items], device=device)
    output = model(input_ids=tokens, attention_mask=mask)
    logits = getattr(output, "logits", output)[:, :-1]
    return logits if logits.dtype == torch.float64 else logits.float(), labels[:, 1:]


def _checked(pair: TextPair, text: str) -> TextPair:
    if len(pair.tokens) < 2 or all(label == IGNORED for label in pair.labels[1:]):
        raise BehaviorError(
            f"Nothing to measure in {text!r}: it has {len(pair.tokens)} tokens and none of them is predicted.",
            cause="the completion is empty, or the tokenizer drops it.",
            fix="pass a completion of at least one token after a prompt of at least one token.",
        )
    return pair
