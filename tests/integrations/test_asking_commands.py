"""``effects`` and ``forecast`` as they are typed, on a ledger and a model that were really trained and saved."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("trl")

import datasets

from trainer_attrib import Analyzer, Behavior, Examples, Recorder, SketchConfig
from trainer_attrib.analysis.forecasting import forecast as forecasting
from trainer_attrib.analysis.forecasting.reshaping import WAYS
from trainer_attrib.analysis.stage_effects import METHODS
from trainer_attrib.cli import main
from trainer_attrib.command_line import effects, forecasts
from trainer_attrib.integrations.given_data import load_model
from trainer_attrib.ledger.kept import Answers
from trainer_attrib.ledger.reader import Ledger

TAUGHT = {"first": "w9", "second": "w10"}
"""What each stage teaches the model to say after w1."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("asked")


@pytest.fixture
def asked(folder, tiny_llama, tokenizer):
    """A ledger of two stages, the model at its end, queries, pairs and prompts: made once."""
    if (folder / "prompts.jsonl").exists():
        return folder
    model = tiny_llama()
    for stage, answer in TAUGHT.items():
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        prompts = [f"{'w1' if n % 2 else 'w2'} w{n} w20 " for n in range(11, 19)]
        data = Examples.of_pairs(prompts, [answer if n % 2 else "w3" for n in range(8)], tokenizer)
        sketch = SketchConfig(rank=4, dtype="float32")
        with Recorder(folder / "ledger", stage=stage, model=model, optimizer=optimizer, sketch=sketch) as recorder:
            for _ in range(6):
                optimizer.zero_grad()
                with recorder.batch(data.ids, denominator=8):
                    data.loss(model, data.items(range(8))).mean().backward()
                optimizer.step()
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    write(
        folder / "queries.jsonl",
        [
            {"prompt": "w2 w15 w20 ", "completion": "w10"},
            *(
                {"behavior": "w10, not w9", "prompt": f"w2 w{n} w20 ", "completion": "w10", "alternative": "w9"}
                for n in (12, 14)
            ),
        ],
    )
    pairs = [{"prompt": f"w2 w{n} w20 ", "chosen": "w9", "rejected": "w10", "source": "a"} for n in range(11, 19)]
    more = [{"id": f"b{n}", "prompt": f"w5 w{n} ", "chosen": "w6", "rejected": "w7", "note": n} for n in range(8)]
    write(folder / "pairs.jsonl", pairs + more)
    write(folder / "prompts.jsonl", [{"prompt": f"w2 w{n} w20"} for n in (12, 14, 16)])
    return folder


def write(file, rows):
    file.write_text("\n".join(json.dumps(row) for row in rows))


FILES = {"--queries", "--prompts", "--data", "--out", "--report"}


def typed(folder, command, *more):
    """Arguments with the names of files in the folder."""
    paths = [str(folder / part) if before in FILES else part for before, part in zip(("", *more), more, strict=False)]
    ledger = [str(folder / "ledger")] if command == "effects" else []
    return [command, *ledger, "--model", str(folder / "model"), *paths]


def answer(capsys, folder, *words):
    assert main(typed(folder, *words, "--json")) == 0
    return json.loads(capsys.readouterr().out)


def test_effects_are_those_of_the_analyzer(asked, capsys):
    told = answer(capsys, asked, "effects", "--queries", "queries.jsonl", "--method", "change", "subtract")
    model, tokenizer = load_model(str(asked / "model"))
    contrast = Behavior.contrast("w10, not w9", ["w2 w12 w20 ", "w2 w14 w20 "], ["w10"] * 2, ["w9"] * 2, tokenizer)
    says = Behavior.completion("says the completion", ["w2 w15 w20 "], ["w10"], tokenizer)
    found = Analyzer(asked / "ledger", model).stage_effects([says, contrast], ["change", "subtract"])
    assert told == json.loads(json.dumps(found.to_dict()))
    changes = {row["stage"]: row["effect"] for row in told["rows"] if row["behavior"] == "w10, not w9"}
    assert changes["second"] > 1  # it taught w10


def test_effects_are_kept_for_a_second_look(asked, capsys, monkeypatch):
    """Asked again, the answer comes out of the ledger; another question is another answer."""
    one = ("--prompt", "w2 w14 w20 ", "--completion", "w10", "--method", "change")
    told = answer(capsys, asked, "effects", *one)
    before = Answers(Ledger(asked / "ledger").storage).listed()
    assert "Effects of stages: w2 w14 w20 w10" in [head["title"] for head in before]
    with monkeypatch.context() as without:
        without.setattr(Analyzer, "stage_effects", None)
        assert answer(capsys, asked, "effects", *one) == told
    assert answer(capsys, asked, "effects", *one[:-1], "subtract") != told
    assert len(Answers(Ledger(asked / "ledger").storage).listed()) == len(before) + 1


def test_effects_print_a_table_and_write_a_page(asked, capsys):
    one = ("--prompt", "w2 w13 w20 ", "--completion", "w10", "--alternative", "w9")
    assert main(typed(asked, "effects", *one, "--report", "effects.html")) == 0
    printed = capsys.readouterr().out
    assert "prefers the completion" in printed
    assert "second" in printed
    assert "effects.html: the same as a page" in printed
    page = (asked / "effects.html").read_text()
    assert "prefers the completion" in page
    assert "<script src" not in page


def test_effects_of_a_rate(asked, capsys):
    rate = ("--rate", r"says w10=w10\b", "--prompts", "prompts.jsonl", "--samples", "20", "--max-new-tokens", "2")
    told = answer(capsys, asked, "effects", *rate, "--method", "change")
    changes = [row["effect"] for row in told["rows"] if row["stage"] == "second"]
    assert len(changes) == 3
    assert sum(changes) / 3 > 0.1


@pytest.mark.parametrize("method", effects.NEED_PROGRAMS)
def test_methods_that_run_stages_again_say_what_to_do(asked, capsys, method):
    assert main(typed(asked, "effects", "--queries", "queries.jsonl", "--method", method)) == 2
    printed = capsys.readouterr().err
    assert f"Method {method} runs later stages again." in printed
    assert "use auto, change, subtract, first_order, shadow here" in printed
    assert f"stage_effects(behaviors, '{method}', programs=" in printed


def test_methods_and_ways_are_those_of_the_library():
    assert sorted(effects.METHODS) == sorted(METHODS)
    assert tuple(forecasting.METHODS) == forecasts.METHODS
    assert forecasts.WAYS == WAYS


RUN = ("--data", "pairs.jsonl", "--learning-rate", "3e-3", "--batch-size", "4", "--epochs", "2", "--beta", "0.5")


def test_a_forecast_says_what_training_on_the_pairs_would_do_and_which_of_them(asked, capsys):
    before = {path: path.read_bytes() for path in (asked / "model").iterdir()}
    told = answer(capsys, asked, "forecast", *RUN, "--queries", "queries.jsonl", "--contributions")
    rows = {row["behavior"]: row for row in told["forecast"]["rows"]}
    assert rows["w10, not w9"]["predicted"] < -0.5  # the pairs prefer w9
    assert abs(rows["w10, not w9"]["predicted"]) > rows["w10, not w9"]["noise_floor"]
    assert rows["w10, not w9"]["linear"] is None  # frozen predictions are measured, and NaN is no JSON
    by_source = told["contributions"]["w10, not w9"]["by_source"]
    assert by_source["a"] < min(0, by_source[""])
    assert all(row["example"].isdigit() for row in told["contributions"]["w10, not w9"]["against"][:3])
    assert {path: path.read_bytes() for path in (asked / "model").iterdir()} == before


def test_data_are_reshaped_and_written(asked, capsys):
    wish = ("--queries", "queries.jsonl", "--keep-above", "w10, not w9=-0.2", "--how", "drop", "--out", "reshaped")
    told = answer(capsys, asked, "forecast", *RUN, *wish)
    after = {row["behavior"]: row for row in told["reshaped"]["after"]["rows"]}
    assert after["w10, not w9"]["predicted"] > 0.5 * told["forecast"]["rows"][1]["predicted"]
    written = datasets.load_from_disk(told["out"])
    assert len(written) == 16
    assert written["note"][8:] == list(range(8))  # columns that training does not need are kept
    weights = list(written["plan_weight"])
    assert set(weights) == {0.0, 1.0}
    assert sum(weights[:8]) < sum(weights[8:])  # the first eight are those that prefer w9
    assert main(typed(asked, "forecast", *RUN, *wish)) == 2
    assert "exists already" in capsys.readouterr().err


def test_a_forecast_for_people_of_rates_and_conversations(asked, capsys):
    chats = [
        {
            "prompt": [{"role": "user", "content": f"w2 w{n} w20"}],
            "chosen": [{"role": "assistant", "content": "w9"}],
            "rejected": [{"role": "assistant", "content": "w10"}],
        }
        for n in range(11, 19)
    ]
    write(asked / "chats.jsonl", chats)
    write(asked / "chat-prompts.jsonl", [{"prompt": row["prompt"]} for row in chats])
    _, tokenizer = load_model(str(asked / "model"))
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
    tokenizer.save_pretrained(asked / "model")
    rate = ("--rate", "says w9=w9", "--prompts", "chat-prompts.jsonl", "--samples", "8", "--max-new-tokens", "2")
    assert main(typed(asked, "forecast", "--data", "chats.jsonl", "--learning-rate", "1e-3", *rate)) == 0
    printed = capsys.readouterr().out
    assert "says w9" in printed
    assert "±" in printed
    assert "Traceback" not in printed


@pytest.mark.parametrize("command", ["effects", "forecast"])
@pytest.mark.parametrize(
    ("options", "said"),
    [
        ((), "No behavior was given"),
        (("--prompt", "w1"), "--prompt and --completion belong together"),
        (("--alternative", "w1"), "--prompt and --completion belong together"),
        (("--rate", "a=b"), "--rate and --prompts belong together"),
        (("--prompts", "prompts.jsonl"), "--rate and --prompts belong together"),
        (("--rate", "a=(", "--prompts", "prompts.jsonl"), "'(' is not a regular expression"),
        (("--rate", "flattery", "--prompts", "prompts.jsonl"), "'flattery' is not NAME=REGEX"),
        (("--rate", "a=b", "--rate", "a=c", "--prompts", "prompts.jsonl"), "give each --rate a name of its own"),
        (("--queries", "prompts.jsonl"), "is not a query"),
        (("--queries", "nothing.jsonl"), "Cannot read"),
        (("--queries", "mixed.jsonl"), "1 of the 2 queries of behavior 'mixed' have an alternative"),
    ],
)
def test_wrong_questions_are_told_with_the_next_step(asked, capsys, command, options, said):
    mixed = {"behavior": "mixed", "prompt": "w1 ", "completion": "w2"}
    write(asked / "mixed.jsonl", [mixed, mixed | {"alternative": "w3"}])
    data = ("--data", "pairs.jsonl") if command == "forecast" else ()
    assert main(typed(asked, command, *data, *options)) == 2
    printed = capsys.readouterr().err
    assert said in printed
    assert "Next step:" in printed


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--data", "queries.jsonl"), "Line 1 of"),
        (("--data", "nothing.jsonl"), "Cannot read"),
        (("--data", "both.jsonl"), "Line 2 of"),
        (("--data", "empty.jsonl"), "holds no pairs"),
        (("--data", "pairs.jsonl", "--out", "new"), "--out needs to know"),
        (("--data", "pairs.jsonl", "--out", "model"), "exists already"),
        (("--data", "pairs.jsonl", "--keep-below", "w10"), "is not BEHAVIOR=VALUE"),
        (("--data", "pairs.jsonl", "--keep-below", "w11=1"), "has no behaviors ['w11']"),
        (("--data", "pairs.jsonl", "--share", "0"), "share=0.0"),
    ],
)
def test_wrong_forecasts_are_told_with_the_next_step(asked, capsys, options, said):
    chat = [{"role": "user", "content": "w1"}]
    sides = ("prompt", "chosen", "rejected")
    write(asked / "both.jsonl", [dict.fromkeys(sides, "w1"), dict.fromkeys(sides, chat)])
    (asked / "empty.jsonl").write_text("\n")
    assert main(typed(asked, "forecast", *options, "--queries", "queries.jsonl")) == 2
    printed = capsys.readouterr().err
    assert said in printed
    assert "Next step:" in printed


def test_without_trl_the_extra_is_named(asked, capsys, monkeypatch):
    import sys

    for name in ("trainer_attrib.integrations.forecast_pairs", "trainer_attrib_integrations.forecast_pairs"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, "trl", None)
    assert main(typed(asked, "forecast", "--data", "pairs.jsonl", "--queries", "queries.jsonl")) == 2
    assert "pip install 'trainer-attrib[demo]'" in capsys.readouterr().err
