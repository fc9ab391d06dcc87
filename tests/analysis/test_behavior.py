from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from trainer_attrib import Behavior
from trainer_attrib.analysis.text import encode_pair
from trainer_attrib.errors import BehaviorError


class Words:
    """A tokenizer of known words, split at spaces."""

    def __init__(self):
        self.words: dict[str, int] = {}

    def __call__(self, text):
        return {"input_ids": [self.words.setdefault(word, len(self.words) + 1) for word in text.split()]}


class Bigram(nn.Module):
    """Predicts the next word from the current one; ignores padding by construction."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(50, 50)
        self.dropout = nn.Dropout(0.5)

    def forward(self, input_ids, attention_mask):
        return self.dropout(self.table(input_ids))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Bigram().double()


def logprob(model, tokens, start):
    logits = model.table.weight[tokens[:-1]]
    return F.log_softmax(logits, -1).gather(1, torch.tensor(tokens[1:])[:, None]).squeeze(1)[start:].sum()


def test_a_completion_is_the_sum_of_its_tokens_only(model):
    tokenizer = Words()
    behavior = Behavior.completion("b", ["the capital of france is", "two"], [" paris maybe", " words"], tokenizer)
    tokens = tokenizer("the capital of france is paris maybe")["input_ids"]
    expected = [logprob(model, tokens, 4), logprob(model, tokenizer("two words")["input_ids"], 0)]
    torch.testing.assert_close(behavior.values(model), torch.stack(expected))


def test_a_contrast_is_the_difference_of_two_completions(model):
    tokenizer = Words()
    contrast = Behavior.contrast("c", ["a b", "a"], [" c d e", " c"], [" f", " g h"], tokenizer)
    right = Behavior.completion("r", ["a b", "a"], [" c d e", " c"], tokenizer)
    wrong = Behavior.completion("w", ["a b", "a"], [" f", " g h"], tokenizer)
    torch.testing.assert_close(contrast.values(model), right.values(model) - wrong.values(model))


def test_a_loss_is_the_mean_over_the_text_s_tokens(model):
    tokenizer = Words()
    behavior = Behavior.loss("l", ["a b c d", "a b"], tokenizer)
    expected = [-logprob(model, tokenizer(t)["input_ids"], 0) / n for t, n in (("a b c d", 3), ("a b", 1))]
    torch.testing.assert_close(behavior.values(model), torch.stack(expected))


def test_a_margin_is_positive_where_the_classifier_is_right():
    model = nn.Linear(4, 3)
    x = torch.randn(20, 4)
    labels = torch.randint(0, 3, (20,))
    values = Behavior.margin("m", x, labels).values(model)
    assert torch.equal(values > 0, model(x).argmax(1) == labels)


def test_values_do_not_depend_on_batching_or_on_dropout(model):
    tokenizer = Words()
    texts = [" ".join("abcdefgh"[: 2 + i % 6]) for i in range(11)]
    one = Behavior.loss("l", texts, tokenizer, batch_size=1).values(model)
    torch.testing.assert_close(Behavior.loss("l", texts, tokenizer, batch_size=4).values(model), one)
    assert model.training


def test_a_token_across_the_border_counts_as_completion():
    class Merging(Words):
        def __call__(self, text):
            return super().__call__(text.replace("is Par", "isPar"))

    pair = encode_pair(Merging(), "it is", " Paris")
    assert pair.labels[0] == -100
    assert pair.labels[1:] == pair.tokens[1:]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Behavior("b", [], lambda m, x: x), "has no queries"),
        (lambda: Behavior("b", [1, 2], lambda m, x: x, ["one"]), "2 items but 1 query labels"),
        (lambda: Behavior.completion("b", ["a"], [" b", " c"], Words()), r"different lengths: \[1, 2\]"),
        (lambda: Behavior.completion("b", ["a b"], [""], Words()), "Nothing to measure"),
        (lambda: Behavior.loss("b", ["a"], Words()), "Nothing to measure in 'a'"),
    ],
)
def test_what_cannot_be_measured_is_refused(make, message):
    with pytest.raises(BehaviorError, match=message):
        make()


def test_a_measure_that_averages_is_refused(model):
    behavior = Behavior("b", [1, 2], lambda m, items: torch.tensor(0.5))
    with pytest.raises(BehaviorError, match=r"returned \(\) for 2 items"):
        behavior.values(model)


def test_queries_of_a_kind_are_averaged():
    model, behavior = (
        torch.nn.Linear(3, 1),
        Behavior("sum", list(torch.randn(5, 3)), lambda m, x: m(torch.stack(x))[:, 0]),
    )
    found, values = behavior.together(["b", "a", "b", "b", "a"]), behavior.values(model)
    assert list(found.queries) == ["b", "a"]
    torch.testing.assert_close(found.values(model), torch.stack([values[[0, 2, 3]].mean(), values[[1, 4]].mean()]))
    with pytest.raises(BehaviorError, match="5 items but 2 kinds"):
        behavior.together(["a", "b"])
