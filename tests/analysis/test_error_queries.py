from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.analysis.adapted import llama, record
from tests.conftest import VOCABULARY
from trainer_attrib import Analyzer
from trainer_attrib.analysis.query_sketches import sketch_queries
from trainer_attrib.analysis.text import encode_pair
from trainer_attrib.errors import BehaviorError, ConfigurationError
from trainer_attrib.tap.names import parameters_by_name


class Letters:
    """A tokenizer: one token per letter."""

    def __call__(self, text):
        return {"input_ids": [2 + ord(letter) % (VOCABULARY - 2) for letter in text]}


PROMPTS, WRONG, RIGHT = ["abcd", "efgh", "ijkl"], ["mnop", "qrstuv", "wx"], ["mnoq", "qrstuu", "wy"]
BACKGROUND = [("abc", "def"), ("bcd", "efg"), ("xyz", "uvw"), ("aaa", "bbbb")]


@pytest.fixture(scope="module")
def analyzer(tmp_path_factory):
    place = tmp_path_factory.mktemp("tuned")
    model = record(llama().double(), place, "tuned")
    return Analyzer(place / "ledger", model)


def asked(analyzer, form="auto", **more):
    return analyzer.error_behavior("error", PROMPTS, WRONG, tokenizer=Letters(), form=form, **more)


def logprobs(model, pair):
    """Of every token after the first, [S-1, V]."""
    with torch.no_grad():
        return model(input_ids=torch.tensor([pair.tokens])).logits[0, :-1].log_softmax(-1)


def at_start(analyzer, of):
    kept = {n: v.clone() for n, v in analyzer.model.state_dict().items()}
    try:
        with torch.no_grad():
            for name, value in analyzer.lineage[0].snapshot("start").items():
                parameters_by_name(analyzer.model)[name].copy_(value)
        return of(analyzer.model)
    finally:
        analyzer.model.load_state_dict(kept)


def test_a_contrast_increases_with_the_wrong_output(analyzer):
    wrong, right = (
        analyzer.error_behavior("one", PROMPTS, outputs, tokenizer=Letters(), form="plain").values(analyzer.model)
        for outputs in (WRONG, RIGHT)
    )
    torch.testing.assert_close(asked(analyzer, right=RIGHT).values(analyzer.model), wrong - right)


@pytest.mark.parametrize("form", ["learned", "alternative"])
def test_tokens_weigh_what_the_stage_added_to_them(analyzer, form):
    model, found = analyzer.model.eval(), asked(analyzer, form).values(analyzer.model)
    for value, prompt, wrong in zip(found, PROMPTS, WRONG, strict=True):
        pair = encode_pair(Letters(), prompt, wrong)
        own = torch.tensor(pair.tokens[1:])[:, None]
        before, after = at_start(analyzer, lambda m, pair=pair: logprobs(m, pair)), logprobs(model, pair)
        gains = (after - before).gather(1, own)[:, 0].clamp_min(0)
        gains[: len(prompt) - 1] = 0  # the prompt's own tokens do not count
        values = after.gather(1, own)
        if form == "alternative":
            values = values - after.gather(1, before.scatter(1, own, -torch.inf).argmax(1)[:, None])
        torch.testing.assert_close(value, (gains / gains.sum() * values[:, 0]).sum())


def test_batches_do_not_change_a_query(analyzer):
    for form in ("learned", "alternative"):
        behavior = asked(analyzer, form)
        alone = torch.cat([behavior.value_of(analyzer.model.eval(), q)[None] for q in range(3)]).detach()
        torch.testing.assert_close(behavior.values(analyzer.model), alone)


def test_background_is_what_other_outputs_share(analyzer):
    plain, found = asked(analyzer, "plain"), asked(analyzer, "background", background=BACKGROUND)
    others = analyzer.error_behavior("others", *zip(*BACKGROUND, strict=True), tokenizer=Letters(), form="plain")
    sketches = [
        sketch_queries(analyzer.model, analyzer.lineage[0], 0, [b]).double().numpy() for b in (plain, others, found)
    ]
    assert np.abs(sketches[2] @ sketches[1].T).max() < 0.02 * np.abs(sketches[0] @ sketches[1].T).max()
    parts = np.linalg.lstsq(sketches[1].T, (sketches[0] - sketches[2]).T, rcond=None)[0]
    np.testing.assert_allclose(sketches[0] - parts.T @ sketches[1], sketches[2], atol=1e-3 * np.abs(sketches[0]).max())


def test_automatic_form(analyzer):
    assert "(not:" in asked(analyzer, right=RIGHT).queries[0]
    assert torch.equal(asked(analyzer).values(analyzer.model), asked(analyzer, "learned").values(analyzer.model))


def test_what_the_stage_did_not_teach_is_said(tmp_path):
    model = record(llama().double(), tmp_path, "tuned", learning_rate=0.0)
    found = asked(Analyzer(tmp_path / "ledger", model), "learned")
    assert all("did not make it likelier" in query for query in found.queries)
    plain = asked(Analyzer(tmp_path / "ledger", model), "plain").values(model)
    torch.testing.assert_close(found.values(model), plain / torch.tensor([len(w) for w in WRONG]))


def test_wrong_use_is_refused(analyzer):
    with pytest.raises(ConfigurationError, match="Unknown form 'best'"):
        asked(analyzer, "best")
    with pytest.raises(ConfigurationError, match="A contrast needs the right outputs"):
        asked(analyzer, "contrast")
    with pytest.raises(ConfigurationError, match="other outputs of the same kind"):
        asked(analyzer, "background")
    with pytest.raises(ConfigurationError, match="No stage 'other'"):
        asked(analyzer, stage="other")
    with pytest.raises(BehaviorError, match="lists of different lengths"):
        asked(analyzer, right=RIGHT[:2])
