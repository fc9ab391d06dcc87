"""The pass over given data from the command line: a recorded model in a folder, examples in a file."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("transformers")

from trainer_attrib import Analyzer, Behavior, Examples, Recorder, SketchConfig
from trainer_attrib.cli import main
from trainer_attrib.errors import ConfigurationError
from trainer_attrib.integrations.given_data import load_model, read_examples

TEXTS = ["w1 w2 w3", "w4 w5", "w1 w3 w5 w7 w9", "w2 w2 w6 w8", "w9 w8 w7"]


@pytest.fixture
def trained(tmp_path, tiny_llama, tokenizer):
    """A ledger, a folder with the model, and a file with its texts."""
    model = tiny_llama()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    data = Examples.of_texts(TEXTS, tokenizer)
    sketch = SketchConfig(rank=64, dtype="float32", correction="none")
    with Recorder(tmp_path / "ledger", stage="sft", model=model, optimizer=optimizer, sketch=sketch) as recorder:
        for _ in range(2):
            optimizer.zero_grad()
            with recorder.batch([str(n) for n in range(len(TEXTS))], denominator=1):
                data.loss(model, data.dataset).sum().backward()
            optimizer.step()
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    lines = [json.dumps({"text": text, "source": "web"}) for text in TEXTS]
    (tmp_path / "texts.jsonl").write_text("\n".join([lines[0], "", *lines[1:]]))
    return tmp_path


def arguments(folder, *more):
    given = {"--model": "model", "--data": "texts.jsonl"}
    paths = [part for name, path in given.items() for part in (name, str(folder / path))]
    return ["sketch", str(folder / "ledger"), "--stage", "sft", *paths, *more]


def test_rows_of_a_file_s_texts_are_their_gradients_at_the_end(trained, tokenizer, capsys):
    assert main(arguments(trained, "--batch-size", "2")) == 0
    assert "sft at end: rows of 5 examples" in capsys.readouterr().out
    assert main(arguments(trained, "--json")) == 0  # finished: nothing to do
    assert json.loads(capsys.readouterr().out)[0]["examples"] == 5
    model, loaded = load_model(str(trained / "model"))
    behavior = Behavior.loss("loss", TEXTS[:2], loaded)
    found = Analyzer(trained / "ledger", model).influence([behavior], recipe="grad_dot", source="snapshot")
    assert set(found.examples.sources) == {"web"}
    weights = [p for p in model.parameters() if p.dim() > 1]  # norms are not in rows
    data = Examples.of_texts(TEXTS, tokenizer)
    losses = [data.loss(model.eval(), [item])[0] for item in data.dataset]
    grads = [torch.cat([g.flatten() for g in torch.autograd.grad(loss, weights)]) for loss in losses]
    expected = -torch.stack(grads[:2]) @ torch.stack(grads).T
    place = [list(found.examples.ids).index(str(n)) for n in range(5)]
    torch.testing.assert_close(torch.from_numpy(found.scores[:, place]), expected, rtol=1e-3, atol=1e-4)


def test_wrong_use_is_one_line_with_the_next_step(trained, capsys):
    assert main(arguments(trained, "--snapshots", "middle")) == 2
    assert "no snapshot 'middle'" in capsys.readouterr().err
    (trained / "model" / "config.json").unlink()
    assert main(arguments(trained)) == 2
    assert "No causal language model with its tokenizer in" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (["{}"], "Line 1 of"),
        (["not json"], "Line 1 of"),
        (['{"text": "w1 w2"}', '{"prompt": "w1", "completion": "w2"}'], "1 of them with a completion"),
        (['{"text": "w1 w2"}', '{"prompt": 1, "completion": "w2"}'], "Line 2 of"),
        ([], "holds 0 examples"),
    ],
)
def test_files_that_hold_no_examples_are_refused(tmp_path, tokenizer, lines, said):
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    with pytest.raises(ConfigurationError, match=said):
        read_examples(str(tmp_path / "data.jsonl"), tokenizer, 2)
    with pytest.raises(ConfigurationError, match="Cannot read"):
        read_examples(str(tmp_path / "nothing.jsonl"), tokenizer, 2)


def test_pairs_keep_their_ids(tmp_path, tokenizer):
    (tmp_path / "data.jsonl").write_text('{"id": 7, "prompt": "w1 ", "completion": "w2 w3"}')
    read = read_examples(str(tmp_path / "data.jsonl"), tokenizer, 2)
    assert (read.ids, read.texts, read.batch_size) == (["7"], ["w1 w2 w3"], 2)
