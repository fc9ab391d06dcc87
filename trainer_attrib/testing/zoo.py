"""Small modules, each with one property that per-example capture gets wrong when it is careless.

A member computes everything a test needs: ``inputs`` makes the keyword arguments of every forward pass of one step,
``losses`` turns the outputs of those passes into one loss per example, and ``left_out`` names the weights that cannot
be captured by example and must be reported instead.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn
from torch.utils.checkpoint import checkpoint

WIDTH, HIDDEN, VOCABULARY, LENGTH = 21, 23, 29, 6
Inputs = dict[str, Tensor]


class Member(nn.Module):
    """Base of the zoo: one forward pass over floats whose outputs are regressed on nothing in particular."""

    left_out: ClassVar[tuple[str, ...]] = ()

    def inputs(self, generator: Generator, batch: int) -> list[Inputs]:
        """Keyword arguments of each forward pass of one step."""
        return [{"x": _floats(generator, batch, LENGTH, WIDTH)}]

    def losses(self, outputs: list[Any], inputs: list[Inputs]) -> Tensor:
        """One loss per example, [B]."""
        return outputs[0].tanh().flatten(1).pow(2).mean(1) + outputs[0].flatten(1).sin().sum(1)


class PlainLinear(Member):
    """A multi-layer perceptron on [B, I]."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, 3, bias=False)

    def inputs(self, generator: Generator, batch: int) -> list[Inputs]:
        """Rows without a sequence axis."""
        return [{"x": _floats(generator, batch, WIDTH)}]

    def forward(self, x: Tensor) -> Tensor:
        """[B, 3]."""
        return self.second(self.first(x).tanh())


class LinearOnThreeAxes(Member):
    """Positions of one example are summed over."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, 4)

    def forward(self, x: Tensor) -> Tensor:
        """[B, S, 4]."""
        return self.second(self.first(x).tanh())


class BatchEqualsSequence(LinearOnThreeAxes):
    """As many examples as positions: the two axes cannot be told apart by their lengths."""

    def inputs(self, generator: Generator, batch: int) -> list[Inputs]:
        """[B, B, I]."""
        return [{"x": _floats(generator, batch, batch, WIDTH)}]


class TiedEmbedding(Member):
    """The head uses the embedding's weight; with ``head_bias``, the head alone has a bias."""

    def __init__(self, *, head_bias: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, HIDDEN)
        self.body = nn.Linear(HIDDEN, HIDDEN)
        self.head = nn.Linear(HIDDEN, VOCABULARY, bias=head_bias)
        self.head.weight = self.embedding.weight

    def inputs(self, generator: Generator, batch: int) -> list[Inputs]:
        """Token rows."""
        return [{"tokens": _tokens(generator, batch)}]

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits [B, S, V]."""
        return self.head(self.body(self.embedding(tokens)).tanh())

    def losses(self, outputs: list[Any], inputs: list[Inputs]) -> Tensor:
        """Summed next-token cross entropy."""
        return _next_token(outputs[0], inputs[0]["tokens"])


class TiedEmbeddingWithHeadBias(TiedEmbedding):
    """The tied weight is captured; the bias belongs to no weight of its own and is reported as not covered."""

    def __init__(self) -> None:
        super().__init__(head_bias=True)


class CalledTwice(Member):
    """One layer, two calls in one forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor) -> Tensor:
        """[B, S, 2]."""
        return self.head(self.layer(self.layer(x).tanh()).tanh())


class FrozenHalf(LinearOnThreeAxes):
    """The first layer does not train."""

    def __init__(self) -> None:
        super().__init__()
        self.first.requires_grad_(False)


class FrozenBias(LinearOnThreeAxes):
    """A layer whose weight trains and whose bias does not."""

    def __init__(self) -> None:
        super().__init__()
        for layer in (self.first, self.second):
            layer.bias.requires_grad_(False)


class PaddedBatch(Member):
    """Rows of different lengths: the embedding has a padding index, the loss a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, HIDDEN, padding_idx=0)
        self.head = nn.Linear(HIDDEN, VOCABULARY)

    def inputs(self, generator: Generator, batch: int) -> list[Inputs]:
        """Token rows, padded on the left with 0: the last padding predicts the first token, so its lookup matters."""
        tokens = _tokens(generator, batch, lowest=1)
        lengths = torch.randint(2, LENGTH + 1, (batch, 1), generator=generator)
        return [{"tokens": tokens * (torch.arange(LENGTH) >= LENGTH - lengths)}]

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits [B, S, V]."""
        return self.head(self.embedding(tokens).tanh())

    def losses(self, outputs: list[Any], inputs: list[Inputs]) -> Tensor:
        """Summed cross entropy of the positions that are not padding."""
        return _next_token(outputs[0], inputs[0]["tokens"], ignored=0)


class WithDropout(Member):
    """Random masks: the oracle must draw the same ones."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, 4)
        self.dropout = nn.Dropout(0.4)

    def forward(self, x: Tensor) -> Tensor:
        """[B, S, 4]."""
        return self.second(self.dropout(self.first(self.dropout(x)).tanh()))


class Checkpointed(Member):
    """The body runs again inside the backward pass."""

    use_reentrant = False

    def __init__(self) -> None:
        super().__init__()
        self.entry, self.body, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor) -> Tensor:
        """[B, S, 2]."""
        hidden = checkpoint(lambda h: self.body(h).tanh(), self.entry(x).tanh(), use_reentrant=self.use_reentrant)
        return self.head(hidden)


class CheckpointedReentrant(Checkpointed):
    """As above, with the first pass outside of any graph."""

    use_reentrant = True


class InPlaceAfterLayer(Member):
    """An in-place activation overwrites a layer's output, which on [B, S, I] is a view: tensor hooks get lost."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, 4)
        self.activation = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """[B, S, 4]."""
        return self.second(self.activation(self.first(x)))


class KeywordInput(LinearOnThreeAxes):
    """Layers called by keyword only."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, S, 4]."""
        return self.second(input=self.first(input=x).tanh())


class TwoForwardsOneBackward(LinearOnThreeAxes):
    """A contrastive loss: two passes over the two sides of each example, one backward for both."""

    def inputs(self, generator: Generator, batch: int) -> list[Inputs]:
        """One pass per side."""
        return [{"x": _floats(generator, batch, LENGTH, WIDTH)} for _ in range(2)]

    def losses(self, outputs: list[Any], inputs: list[Inputs]) -> Tensor:
        """The two sides of an example should agree."""
        left, right = (output.flatten(1) for output in outputs)
        return F.softplus(-(left * right).sum(1))


class RankOneSides(Member):
    """Weights with sides of length 1 and others shorter than the rank: projections become identities."""

    def __init__(self) -> None:
        super().__init__()
        self.widen, self.narrow = nn.Linear(1, 7), nn.Linear(7, 1)

    def inputs(self, generator: Generator, batch: int) -> list[Inputs]:
        """One number per example."""
        return [{"x": _floats(generator, batch, 1)}]

    def forward(self, x: Tensor) -> Tensor:
        """[B, 1]."""
        return self.narrow(self.widen(x).tanh())


class BroadcastPosition(TiedEmbedding):
    """Positions are looked up once for the whole batch: their gradient cannot be told apart by example."""

    left_out: ClassVar[tuple[str, ...]] = ("position.weight",)

    def __init__(self) -> None:
        super().__init__()
        self.position = nn.Embedding(LENGTH, HIDDEN)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits [B, S, V]."""
        positions = self.position(torch.arange(tokens.shape[1])[None])  # [1, S, H]
        return self.head(self.body(self.embedding(tokens) + positions).tanh())


class PositionsWithoutBatch(BroadcastPosition):
    """As above without a batch axis at all; ``inputs`` has as many examples as positions, so lengths tell nothing."""

    def inputs(self, generator: Generator, batch: int) -> list[Inputs]:
        """[B, B] token rows."""
        return [{"tokens": _tokens(generator, batch)[:, :batch]}]

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits [B, S, V]."""
        positions = self.position(torch.arange(tokens.shape[1]))  # [S, H]
        return self.head(self.body(self.embedding(tokens) + positions).tanh())


class ConvNet(Member):
    """Convolutions with strides, dilation and every way of padding, on images and on their rows in sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 7, (3, 2), stride=2, padding=1, padding_mode="reflect")
        self.second = nn.Conv2d(7, 5, 3, dilation=2, padding="same", bias=False)
        self.third = nn.Conv1d(5, 6, 4, padding=2, padding_mode="circular")
        self.activation, self.head = nn.ReLU(inplace=True), nn.Linear(6, 2)

    def inputs(self, generator: Generator, batch: int) -> list[Inputs]:
        """Images [B, 3, 9, 8]."""
        return [{"x": _floats(generator, batch, 3, 9, 8)}]

    def forward(self, x: Tensor) -> Tensor:
        """[B, S, 2]."""
        hidden = self.second(self.activation(self.first(x)).sin()).tanh()
        return self.head(self.third(hidden.flatten(2)).tanh().transpose(1, 2))


class GroupedConv(ConvNet):
    """A convolution in groups has several matrices and is refused; the others are captured."""

    def __init__(self) -> None:
        super().__init__()
        self.second = nn.Conv2d(7, 7, 3, padding=1, groups=7)
        self.third = nn.Conv1d(7, 6, 3)


class NormsEverywhere(LinearOnThreeAxes):
    """Norms on two and three axes, called twice, without a bias; captured where they are registered."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.plain = nn.LayerNorm(WIDTH), nn.LayerNorm(HIDDEN, bias=False)
        self.rms, self.last = nn.RMSNorm(HIDDEN), nn.LayerNorm(4)
        for p in (*self.norm.parameters(), *self.plain.parameters(), *self.rms.parameters()):
            nn.init.normal_(p)

    def forward(self, x: Tensor) -> Tensor:
        """[B, 4]."""
        return self.last(self.second(self.rms(self.plain(self.first(self.norm(self.norm(x))).tanh()))).mean(1))


MEMBERS: tuple[type[Member], ...] = (
    PlainLinear,
    LinearOnThreeAxes,
    BatchEqualsSequence,
    TiedEmbedding,
    TiedEmbeddingWithHeadBias,
    CalledTwice,
    FrozenHalf,
    FrozenBias,
    PaddedBatch,
    WithDropout,
    Checkpointed,
    CheckpointedReentrant,
    InPlaceAfterLayer,
    KeywordInput,
    TwoForwardsOneBackward,
    RankOneSides,
    BroadcastPosition,
    PositionsWithoutBatch,
    ConvNet,
    GroupedConv,
    NormsEverywhere,
)


def _floats(generator: Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator).to(torch.get_default_dtype())


def _tokens(generator: Generator, batch: int, lowest: int = 0) -> Tensor:
    return torch.randint(lowest, VOCABULARY, (batch, LENGTH), generator=generator)


def _next_token(logits: Tensor, tokens: Tensor, ignored: int = -100) -> Tensor:
    targets = tokens[:, 1:]
    return F.cross_entropy(logits[:, :-1].transpose(1, 2), targets, ignore_index=ignored, reduction="none").sum(1)
