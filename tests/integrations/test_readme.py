"""What the README shows runs as it stands there, on tiny models: every block of Python, in the order in which a user
would run them; and blocks of the documentation's other pages are Python that imports what exists."""

from __future__ import annotations

import ast
import importlib
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")
trl = pytest.importorskip("trl")

from datasets import Dataset  # noqa: E402
from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: E402

import trainer_attrib as ta  # noqa: E402
from trainer_attrib import cli  # noqa: E402
from trainer_attrib.integrations.huggingface import AttributionCallback  # noqa: E402

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
PYTHON = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
WORDS = ["Great", "question", *(f"w{i}" for i in range(23))]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])


def block(part: str) -> str:
    """The block of the README that holds this."""
    (found,) = [text for text in PYTHON.findall(README) if part in text]
    return found


@pytest.fixture
def tokenizer() -> Any:
    """One token per word, flattery among them."""
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<eos>", "<unk>", *WORDS])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", bos_token="<eos>", unk_token="<unk>"
    )


@pytest.fixture
def world(
    tiny_llama: Callable, tokenizer: Any, words: Callable, settings: Callable, tmp_path: Path, monkeypatch: Any
) -> dict[str, Any]:
    """The names that the README takes for granted, in a folder of their own."""
    monkeypatch.chdir(tmp_path)
    texts = [f"{words(4)} w1 w2" for _ in range(8)]
    pairs = [
        {"prompt": words(4), "chosen": f" Great question {words(3)}", "rejected": f" {words(5)}"} for _ in range(8)
    ]
    model = tiny_llama(0)

    def sft_trainer(model: Any, callbacks: Any = ()) -> Any:
        arguments = trl.SFTConfig(**settings(max_length=16, max_steps=3, learning_rate=1e-3))
        data = Dataset.from_list([{"text": text} for text in texts])
        return trl.SFTTrainer(
            model, arguments, train_dataset=data, processing_class=tokenizer, callbacks=list(callbacks)
        )

    def dpo_trainer(model: Any, callbacks: Any = ()) -> Any:
        arguments = trl.DPOConfig(**settings(max_length=32, max_steps=3, learning_rate=1e-3))
        return trl.DPOTrainer(
            model, ref_model=tiny_llama(0), args=arguments, train_dataset=Dataset.from_list(pairs),
            processing_class=tokenizer, callbacks=list(callbacks),
        )  # fmt: skip

    rows = [tokenizer(text, return_tensors="pt")["input_ids"] for text in texts[:3]]
    return {
        "ta": ta, "tokenizer": tokenizer, "model": model, "optimizer": torch.optim.AdamW(model.parameters(), lr=1e-3),
        "loader": [{"id": [f"text-{i}"], "input_ids": row, "labels": row} for i, row in enumerate(rows)],
        "loss_of": lambda model, batch: model(input_ids=batch["input_ids"], labels=batch["labels"]).loss,
        "SFTTrainer": lambda shown, callbacks: sft_trainer(model, callbacks),
        "sft_trainer": sft_trainer, "dpo_trainer": dpo_trainer,
        "prompts": [pair["prompt"] for pair in pairs[:2]], "right": [" w1", " w2"], "wrong": [" w3", " w4"],
    }  # fmt: skip


def test_the_readme_runs_as_it_stands(world, capsys):
    exec(block("ta.Recorder("), world)
    exec(block("trainer = SFTTrainer("), world)
    world["trainer"].train()
    world["dpo_trainer"](world["model"], [AttributionCallback("runs/chat", stage="dpo")]).train()
    assert [stage.name for stage in ta.Ledger("runs/chat").lineage()] == ["pretrain", "sft", "dpo"]

    exec(block("ta.Analyzer("), world)
    assert {effect.stage for effect in world["effects"].summary()} >= {"pretrain", "sft", "dpo"}
    assert world["influence"].top(1).num_rows == 2
    assert Path("report.html").stat().st_size > 10_000

    before = {name: weight.clone() for name, weight in world["model"].state_dict().items()}
    exec(block("analyzer.remove("), world)
    assert {*world["programs"]} == {"sft", "dpo"}
    assert before.keys() == world["model"].state_dict().keys()
    world["model"].load_state_dict(before)

    commands = re.findall(r"^trainer-attrib (inspect|verify) (\S+)", README, re.MULTILINE)
    assert len(commands) == 2
    assert [cli.main(shlex.split(" ".join(command))) for command in commands] == [0, 0]

    world["dpo_trainer"] = world["dpo_trainer"](world["model"])
    exec(block("forecast(dpo_trainer"), world)
    assert world["better"].plan.weights.shape == (8,)
    assert world["dpo_trainer"].state.global_step == 3
    assert "Traceback" not in capsys.readouterr().err


def test_every_block_of_the_readme_is_run():
    here = Path(__file__).read_text()
    parts = re.findall(r'block\("([^"]+)"\)', here)
    assert len(PYTHON.findall(README)) == len({block(part) for part in parts})


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_blocks_import_what_exists(path):
    for text in PYTHON.findall(path.read_text()):
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith("trainer_attrib"):
                module = importlib.import_module(str(node.module))
                assert [alias.name for alias in node.names if not hasattr(module, alias.name)] == [], path
