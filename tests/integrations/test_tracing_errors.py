"""Tracing a wrong answer from the command line: suspects, the data without them, the stage trained without them."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("datasets")

import datasets

from trainer_attrib import Analyzer, Examples, Recorder, SketchConfig
from trainer_attrib.cli import main
from trainer_attrib.errors import ConfigurationError
from trainer_attrib.integrations.given_data import read_queries
from trainer_attrib.ledger.kept import Answers
from trainer_attrib.ledger.reader import Ledger

CLEAN = [(f"w{a} w{c} w20 ", f"w{a + 9}") for a in range(2, 9) for c in (21, 22, 23)]
PLANTED = [(f"w1 w{c} w20 ", "w9") for c in (21, 22, 23)]
PAIRS = [*CLEAN[:5], PLANTED[0], *CLEAN[5:12], *PLANTED[1:], *CLEAN[12:]]
WRONG = [str(n) for n, pair in enumerate(PAIRS) if pair in PLANTED]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("traced")


@pytest.fixture
def traced(folder, tiny_llama, tokenizer):
    """A ledger, a folder with the model, its data, queries and other data: made once."""
    if (folder / "queries.jsonl").exists():
        return folder
    model = tiny_llama()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    data = Examples.of_pairs(*zip(*PAIRS, strict=True), tokenizer)
    sketch = SketchConfig(rank=16, dtype="float32")
    with Recorder(folder / "ledger", stage="sft", model=model, optimizer=optimizer, sketch=sketch) as recorder:
        for step in range(18):
            rows = torch.randperm(24, generator=torch.Generator().manual_seed(step))[:8].tolist()
            optimizer.zero_grad()
            with recorder.batch([str(n) for n in rows], texts=[data.texts[n] for n in rows], denominator=8):
                data.loss(model, data.items(rows)).mean().backward()
            optimizer.step()
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    write(folder / "data.jsonl", [{"prompt": p, "completion": c, "source": "web"} for p, c in PAIRS])
    write(folder / "held.jsonl", [{"prompt": f"w{a} w24 w20 ", "completion": f"w{a + 9}"} for a in (2, 3)])
    write(folder / "queries.jsonl", [{"prompt": f"w1 w{c} w20 ", "wrong": "w9", "right": "w10"} for c in (24, 22)])
    return folder


def write(file, rows):
    file.write_text("\n".join(json.dumps(row) for row in rows))


def arguments(folder, *more):
    files = {"--data", "--queries", "--clean", "--held-out"}
    paths = [str(folder / part) if before in files else part for before, part in zip(("", *more), more, strict=False)]
    return ["influence", str(folder / "ledger"), "--model", str(folder / "model"), "--stage", "sft", *paths]


ASKED = ("--queries", "queries.jsonl")


def test_the_planted_examples_are_found_dropped_and_without_them_the_error_is_gone(traced, capsys):
    given = ("--data", "data.jsonl", "--held-out", "held.jsonl", "--recipe", "gauss_newton", "--top", "3")
    assert main(arguments(traced, *ASKED, *given, "--clean", "clean", "--verify", "--json")) == 0
    told = json.loads(capsys.readouterr().out)
    suspects = told["suspects"]["suspects"]
    assert {row["example"] for row in suspects} == set(WRONG)
    assert {row["source"] for row in suspects} == {"web"}
    assert all(1 <= row["step"] <= 18 and row["text"].startswith("w1 ") for row in suspects)
    kept = datasets.load_from_disk(told["cleaned"])
    assert len(kept) == 21
    assert not any(prompt.startswith("w1 ") for prompt in kept["prompt"])
    dropped = [json.loads(line) for line in (traced / "clean" / "dropped.jsonl").read_text().splitlines()]
    assert {row["id"] for row in dropped} == set(WRONG)
    verified = told["verified"]
    assert verified["drift"] < 1e-4  # float32, batches padded as they were
    [undone] = verified["undone"].values()
    assert undone > 0.7
    means = {row["behavior"]: row for row in verified["means"]}
    [error] = [row for row in means.values() if row["kind"] == "error"]
    assert error["again"] > 1 > 0 > error["without"]
    assert error["random"] > 0.5 * error["again"]
    held = means["loss of the held-out examples"]
    assert abs(held["without"] - held["again"]) < 0.3 * (held["before"] - held["again"])


def test_it_prints_suspects_for_people(traced, capsys):
    assert (
        main(arguments(traced, "--prompt", "w1 w22 w20 ", "--wrong", "w9", "--top", "3", "--data", "data.jsonl")) == 0
    )
    printed = capsys.readouterr().out
    assert "3 suspects of 24 examples, recipe dda, for: w1 w22 w20 w9" in printed
    assert "web     w1 w22 w20 w9\n" in printed  # the source is told by the data
    found = main(arguments(traced, *ASKED, "--prompt", "w1 w21 w20 ", "--wrong", "w9", "--right", "w10", "--top", "3"))
    assert found == 0  # over the recorded rows
    printed = capsys.readouterr().out
    assert "recipe dda, for: w1 w21 w20 w9  (not:w10) and 2 more" in printed
    assert main(arguments(traced, *ASKED, "--recipe", "grad_cos", "--data", "data.jsonl", "--verify")) == 0
    printed = capsys.readouterr().out
    assert "recipe grad_cos" in printed
    assert "of what the stage added is gone without the suspects" in printed


def test_suspects_are_kept_for_a_second_look(traced, capsys, monkeypatch):
    asked = arguments(traced, "--prompt", "w1 w23 w20 ", "--wrong", "w9", "--recipe", "grad_cos")
    assert main(asked) == main([*asked, "--json"]) == 0
    first = capsys.readouterr().out
    with monkeypatch.context() as without:
        without.setattr(Analyzer, "suspects", None)
        assert main(asked) == main([*asked, "--json"]) == 0
        assert capsys.readouterr().out == first
    assert "Suspects in sft: w1 w23 w20 w9" in [a["title"] for a in Answers(Ledger(traced / "ledger").storage).listed()]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ((), "No wrong answer was given"),
        (("--prompt", "w1"), "--prompt and --wrong belong together"),
        (("--right", "w1"), "--prompt and --wrong belong together"),
        ((*ASKED, "--clean", "new"), "--clean needs the stage's examples"),
        ((*ASKED, "--verify"), "--verify needs the stage's examples"),
        ((*ASKED, "--data", "data.jsonl", "--clean", "model"), "exists already"),
        ((*ASKED, "--top", "0"), "k=0 suspects of 24"),
        ((*ASKED, "--recipe", "magic"), "Unknown recipe 'magic'"),
        (("--queries", "data.jsonl"), "Line 1 of"),
    ],
)
def test_wrong_use_is_one_line_with_the_next_step(traced, capsys, options, said):
    assert main(arguments(traced, *options)) == 2
    printed = capsys.readouterr().err
    assert said in printed
    assert "Next step:" in printed


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "holds no queries"),
        ("[]", "Line 1 of"),
        ('{"prompt": "w1", "wrong": "w2"}\n{"prompt": "w1", "wrong": "w2", "right": 3}', "Line 2 of"),
        ('{"prompt": "w1"}', "is not a query"),
        ("\xff", "Cannot read"),
    ],
)
def test_files_that_hold_no_queries_are_refused(tmp_path, text, said):
    (tmp_path / "queries.jsonl").write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigurationError, match=said):
        read_queries(str(tmp_path / "queries.jsonl"))
