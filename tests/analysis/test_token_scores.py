from __future__ import annotations

import dataclasses
import re

import numpy as np
import pytest
import tokenizers
import torch
import transformers

from tests.analysis.adapted import adapted, llama, losses, record, rows_of
from trainer_attrib import Analyzer, Examples
from trainer_attrib.analysis.examples import TokenLosses
from trainer_attrib.analysis.recipes.directional import Directional
from trainer_attrib.analysis.text import TextPair, encode_pair, pieces, text_losses, token_losses
from trainer_attrib.errors import ConfigurationError, MissingDataError
from trainer_attrib.report.escape import escaped
from trainer_attrib.tap.names import parameters_by_name


def examples(tokens=True):
    rows = rows_of("tuned")
    items = [TextPair(tuple(row["input_ids"]), (-100, -100, *row["input_ids"][2:])) for row in rows]
    by_token = TokenLosses(token_losses, lambda item: [f"<{token}>" for token in item.tokens])
    return Examples(items, text_losses, [row["id"] for row in rows], batch_size=3, tokens=by_token if tokens else None)


@pytest.fixture(scope="module")
def analyzer(tmp_path_factory):
    place = tmp_path_factory.mktemp("tuned")
    model = record(adapted(llama().double()), place, "tuned")
    return Analyzer(place / "ledger", model)


@pytest.mark.parametrize("recipe", [Directional(), Directional(("mid-1", "end"))])
def test_tokens_add_up_to_the_score_of_their_example(analyzer, recipe):
    data = {"tuned": examples()}
    scores = analyzer.influence([losses()], recipe=recipe, data=data)
    found = analyzer.token_scores(scores, [losses()], data, top=2, recipe=recipe)
    assert len(found.tokens) == 3 * 4
    for (query, column), tokens in found.tokens.items():
        np.testing.assert_allclose(tokens.scores.sum(), scores.scores[query, column], rtol=1e-5)
        assert len(tokens.pieces) == len(data["tuned"].dataset[column].tokens)
        assert not tokens.scores[:2].any()
        assert tokens.scores[2:].all()


def test_a_token_s_score_is_the_product_of_its_own_gradient(analyzer):
    data, model = {"tuned": examples()}, analyzer.model.eval()
    found = analyzer.token_scores(analyzer.influence([losses()]), [losses()], data, top=1)
    stage = analyzer.lineage[0]
    places = {n: p for n, p in parameters_by_name(model).items() if p.requires_grad}
    moments = stage.moments("end")
    rate = np.mean([rates[0] for rates in stage.steps()["learning_rate"].to_pylist()])
    (query, column), tokens = next(iter(found.tokens.items()))
    item = data["tuned"].dataset[data["tuned"].ids.index(found.examples.ids[column])]
    gradient = torch.autograd.grad(losses().value_of(model, query), list(places.values()))
    for position in range(2, len(item.tokens)):
        own = torch.autograd.grad(token_losses(model, [item])[0, position], list(places.values()))
        score = 0.0
        for name, g, o in zip(places, gradient, own, strict=True):
            reach = torch.where(moments[name] > 0, rate / (moments[name].sqrt() + 1e-8), 0.0)
            score -= float((reach * g * o).sum())
        np.testing.assert_allclose(tokens.scores[position], score, rtol=1e-4, atol=1e-9)


def test_they_are_a_table_and_colors_of_the_page(analyzer, tmp_path):
    plain = analyzer.influence([losses()])
    found = analyzer.token_scores(plain, [losses()], {"tuned": examples()}, top=1)
    assert plain.tokens == {}
    assert plain.token_table().num_rows == 0
    table = found.token_table()
    assert table.column_names == plain.token_table().column_names
    assert table.num_rows == sum(len(tokens.pieces) for tokens in found.tokens.values())
    assert any("add up to its scores" in caveat for caveat in found.caveats)
    html = found.report(tmp_path / "report.html").read_text()
    for tokens in found.tokens.values():
        strongest = tokens.pieces[int(np.abs(tokens.scores).argmax())]
        assert re.search(f'style="--w:1.00" title="[^"]+">{escaped(strongest)}<', html)
    assert "Tokens: green increased it" in html


def test_what_does_not_belong_together_is_refused(analyzer):
    scores = analyzer.influence([losses()])
    with pytest.raises(MissingDataError, match="no losses by token"):
        analyzer.token_scores(scores, [losses()], {"tuned": examples(tokens=False)})
    with pytest.raises(MissingDataError, match="needs the examples of stage 'tuned'"):
        analyzer.token_scores(scores, [losses()], {})
    with pytest.raises(ConfigurationError, match="not the 6 of the behaviors"):
        analyzer.token_scores(scores, [losses(), losses()], {"tuned": examples()})
    others = dataclasses.replace(examples(), ids=[f"other-{i}" for i in range(8)])
    with pytest.raises(ConfigurationError, match="scored examples are not among the given ones"):
        analyzer.token_scores(scores, [losses()], {"tuned": others})


def test_pieces_of_byte_tokens_are_the_text():
    inner = tokenizers.Tokenizer(tokenizers.models.BPE({c: i for i, c in enumerate(bytes_shown())}, []))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=inner)
    text = "né 日 , ok"
    item = encode_pair(tokenizer, "n", text[1:])
    shown = pieces(tokenizer, item)
    assert "".join(shown) == text
    assert len(shown) == len(item.tokens) == len(text.encode())
    assert shown[:3] == ["n", "", "é"]


def bytes_shown():
    return sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
