from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from trainer_attrib import Examples
from trainer_attrib.analysis.examples import FEW_CLASSES


class Words(nn.Module):
    """A language model over 5 words, in float64, whose logits depend on the last word alone."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(5, 5).double()

    def forward(self, input_ids, attention_mask=None):
        return self.table(input_ids)


def tokenizer(text):
    return {"input_ids": [int(digit) for digit in text]}


def outer_of(model, value):
    (gradient,) = torch.autograd.grad(value, list(model.parameters())[:1], retain_graph=True)
    return torch.outer(gradient.flatten(), gradient.flatten())


def test_losses_of_texts_and_pairs_are_those_of_the_tokens_that_count():
    model = Words()
    texts = Examples.of_texts(["0123", "40"], tokenizer, ids=["a", "b"])
    pairs = Examples.of_pairs(["01"], ["23"], tokenizer)
    logits = model(torch.tensor([[0, 1, 2, 3]]))[0]
    token = F.cross_entropy(logits[:-1], torch.tensor([1, 2, 3]), reduction="none")
    torch.testing.assert_close(texts.loss(model, texts.items([0, 1]))[0], token.mean())
    torch.testing.assert_close(pairs.loss(model, pairs.items([0]))[0], token[1:].mean())
    assert texts.ids == ["a", "b"]
    assert pairs.ids == ["0"]
    assert pairs.texts == ["0123"]


def test_batches_put_items_of_similar_length_together_and_hold_each_once():
    texts = Examples.of_texts(["01", "01234", "0123", "012"], tokenizer, batch_size=2)
    assert texts.batches() == [[1, 2], [3, 0]]


def test_the_classes_losses_add_up_to_the_gauss_newton_matrix():
    torch.manual_seed(0)
    model, x = nn.Linear(3, 4).double(), torch.randn(2, 3).double()
    data = Examples.of_classes(x, [0, 1])
    found = sum(outer_of(model, losses[1]) for losses in data.fisher(model, data.items([0, 1]), torch.Generator()))
    p = model(x[1]).softmax(0).detach()
    expected = torch.kron(torch.diag(p) - torch.outer(p, p), torch.outer(x[1], x[1]))
    torch.testing.assert_close(found, expected)


def test_of_many_classes_one_is_drawn():
    torch.manual_seed(0)
    model, x = nn.Linear(3, FEW_CLASSES + 1).double(), torch.randn(2, 3).double()
    data = Examples.of_classes(x, [0, 1])
    drawn = list(data.fisher(model, data.items([0, 1]), torch.Generator().manual_seed(3)))
    assert len(drawn) == 1
    assert any(torch.allclose(drawn[0][0], -value) for value in model(x[0]).log_softmax(0))


def test_drawn_tokens_give_the_gauss_newton_matrix_of_the_mean_loss_in_expectation():
    model, generator = Words(), torch.Generator().manual_seed(0)
    data = Examples.of_texts(["0121"], tokenizer)
    draws = []
    for _ in range(4000):
        (losses,) = data.fisher(model, data.items([0]), generator)
        draws.append(outer_of(model, losses[0]))
    draws = torch.stack(draws)
    expected = torch.zeros(25, 25).double()
    for word in (0, 1, 2):  # that is followed by a token that counts
        p, seen = model.table.weight[word].softmax(0).detach(), F.one_hot(torch.tensor(word), 5).double()
        expected += torch.kron(torch.outer(seen, seen), torch.diag(p) - torch.outer(p, p)) / 3
    error = (draws.mean(0) - expected).abs() / (draws.std(0) / len(draws) ** 0.5 + 1e-9)
    assert float(error.max()) < 5
