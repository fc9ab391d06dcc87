"""Rates of sampled generations: what is drawn, what is detected, exact gradients, re-weighting."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

from trainer_attrib import Behavior
from trainer_attrib.analysis.behavior import evaluating
from trainer_attrib.analysis.displacement import moved
from trainer_attrib.analysis.forecasting.reading import Readings, mean_gradient
from trainer_attrib.analysis.rates import Generations
from trainer_attrib.analysis.text import completion_logprobs
from trainer_attrib.errors import BehaviorError
from trainer_attrib.tap.names import parameters_by_name


class Letters:
    """A tokenizer of 29 letters, the first two special."""

    eos_token_id, pad_token_id = 1, 0

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [ord(c) - ord("A") + 2 for c in text]}

    def decode(self, tokens: list[int], skip_special_tokens: bool = True) -> str:
        return "".join(chr(t - 2 + ord("A")) for t in tokens if t > 1)


@pytest.fixture
def model(tiny_gpt2: Callable[..., Any]) -> Any:
    pytest.importorskip("transformers")
    return tiny_gpt2()


def test_the_same_model_says_the_same_and_the_program_draws_on_as_before(model: Any) -> None:
    said = Generations(["ABC", "D"], Letters(), per_prompt=3, max_new_tokens=4)
    torch.manual_seed(9)
    expected = torch.rand(3)
    torch.manual_seed(9)
    with evaluating(model):
        first = said.of(model)
        assert said.of(model) is first
    assert torch.equal(torch.rand(3), expected)
    again = Generations(["ABC", "D"], Letters(), per_prompt=3, max_new_tokens=4)
    with evaluating(model):
        assert again.of(model).texts == first.texts
    assert list(first.owners) == [0, 0, 0, 1, 1, 1]
    logprobs = torch.cat([completion_logprobs(model, [item]) for item in first.items]).double()
    assert torch.allclose(said.logprobs(model, first), logprobs, atol=1e-5)
    for item in first.items:
        ends = [place for place, token in enumerate(item.tokens) if token == Letters.eos_token_id]
        assert ends in ([], [len(item.tokens) - 1]), "nothing follows the end"


def test_detectors(model: Any) -> None:
    said = Generations(["ABC", "D"], Letters(), per_prompt=8, max_new_tokens=5)
    rule = Behavior.rate("rule", said, lambda prompt, text: "E" in text and prompt == "D")
    pattern = Behavior.rate("pattern", said, re.compile("E"))
    one = Behavior.rate("one class", said, "E", where=lambda prompt: prompt == "D")
    with evaluating(model):
        texts = said.of(model).texts
    shares = [sum("E" in text for text in texts[i : i + 8]) / 8 for i in (0, 8)]
    assert pattern.values(model).tolist() == shares
    assert rule.values(model).tolist() == [0.0, shares[1]]
    assert one.values(model).tolist() == [shares[1]]
    assert one.queries == ["D"]
    with pytest.raises(BehaviorError, match="return a bool or a number"):
        Behavior.rate("bad", said, lambda prompt, text: 2).values(model)
    with pytest.raises(BehaviorError, match="no queries"):
        Behavior.rate("none", said, "E", where=lambda prompt: False)
    with pytest.raises(BehaviorError, match="without a token"):
        Generations([""], Letters())


def test_the_gradient_is_that_of_the_expected_rate(model: Any) -> None:
    """With one new token the rate is a sum of probabilities, whose gradient is known."""
    said = Generations(["ABC"], Letters(), per_prompt=4000, max_new_tokens=1, batch_size=4000)
    behavior = Behavior.rate("vowels", said, "[AEIOU]")
    found = mean_gradient(model, behavior)
    vowels = [Letters()("AEIOU")["input_ids"]]
    with evaluating(model):
        chances = model(input_ids=torch.tensor([Letters()("ABC")["input_ids"]])).logits[0, -1].softmax(-1)
        rate = chances[torch.tensor(vowels[0])].sum()
        expected = torch.autograd.grad(rate, list(model.parameters()), allow_unused=True)
    assert float(behavior.values(model).mean()) == pytest.approx(rate.item(), abs=0.03)
    ours = torch.cat([found[name].flatten() for name in parameters_by_name(model)])
    theirs = torch.cat([
        (torch.zeros_like(p) if g is None else g).flatten().double()
        for p, g in zip(parameters_by_name(model).values(), expected, strict=True)
    ])  # fmt: skip
    cosine = float(ours @ theirs / (ours.norm() * theirs.norm()))
    assert cosine > 0.9  # 4000 samples
    assert float(ours.norm()) == pytest.approx(float(theirs.norm()), rel=0.15)


def test_the_gradient_of_a_pattern_leaves_out_what_is_said_after_it(model: Any) -> None:
    """Two new tokens: the expected rate by enumeration. A rule that says the same cannot know when it is decided."""
    said = Generations(["ABC"], Letters(), per_prompt=6000, max_new_tokens=2, batch_size=6000)
    pattern, rule = (
        Behavior.rate("vowels", said, found) for found in ("[AEIOU]", lambda _, text: any(v in text for v in "AEIOU"))
    )
    assert torch.equal(pattern.values(model), rule.values(model))
    start, letters = Letters()("ABC")["input_ids"], range(len(model.get_input_embeddings().weight))
    vowels = torch.tensor(Letters()("AEIOU")["input_ids"])
    consonants = torch.tensor([i for i in letters if i not in vowels and i != Letters.eos_token_id])
    with evaluating(model):
        first = model(input_ids=torch.tensor([start])).logits[0, -1].softmax(-1)
        both = torch.tensor([[*start, int(i)] for i in consonants])
        then = model(input_ids=both).logits[:, -1].softmax(-1)[:, vowels].sum(1)
        rate = first[vowels].sum() + (first[consonants] * then).sum()
        expected = torch.autograd.grad(rate, list(model.parameters()), allow_unused=True)
    gradients = zip(parameters_by_name(model).items(), expected, strict=True)
    theirs = {name: torch.zeros_like(p) if g is None else g for (name, p), g in gradients}
    errors = [
        sum(float((found[name] - theirs[name]).square().sum()) for name in theirs)
        for found in (mean_gradient(model, pattern), mean_gradient(model, rule))
    ]
    assert errors[0] < 0.02 * sum(float(g.square().sum()) for g in theirs.values())
    assert errors[0] < errors[1]


def test_small_moves_are_re_weighted_and_large_ones_drawn_anew(model: Any) -> None:
    said = Generations(["ABC", "DEF"], Letters(), per_prompt=600, max_new_tokens=2, batch_size=600)
    behavior = Behavior.rate("vowels", said, "[AEIOU]")
    readings = Readings(model, [behavior])
    direction = mean_gradient(model, behavior)
    size = sum(float(d.square().sum()) for d in direction.values()) ** 0.5
    near, far = ({name: scale / size * d for name, d in direction.items()} for scale in (0.2, 20.0))
    [small] = readings.of(near)
    assert small.how == "re-weighted"
    with moved(model, near), evaluating(model):
        weights = (said.logprobs(model, said.of(model)) - 0).exp()  # drawn anew, for comparison
        assert len(weights) == 1200
        anew = float(behavior.values(model).mean())
    assert small.change == pytest.approx(anew - float(readings.before[0].mean()), abs=4 * small.standard_error + 1e-3)
    assert small.change > 0
    [large] = readings.of(far)
    assert large.how == "drawn anew"
    assert large.effective < 0.6
    [nothing] = readings.of({name: 0 * d for name, d in direction.items()})
    assert nothing.change == pytest.approx(0, abs=1e-6)
    assert nothing.effective == pytest.approx(1)


def test_a_model_that_says_nothing_is_refused() -> None:
    behavior = Behavior.rate("any", ["AB"], "A", Letters())
    with pytest.raises(BehaviorError, match="generate"):
        behavior.values(torch.nn.Linear(2, 2))
