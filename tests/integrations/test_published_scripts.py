"""Scripts that the frameworks publish, run as they are and with one import and one argument more.

The scripts are those that the installed packages hold. Others are taken from copies of the frameworks' repositories:
``TRAINER_ATTRIB_EXAMPLES`` names a folder that holds them (``transformers/examples/...``,
``pytorch-lightning/examples/...``); without it their tests are skipped. Only the data is ours: small, made here, found
where the scripts look for it.
"""

from __future__ import annotations

import difflib
import importlib.util
import json
import os
import runpy
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("trl")
pytest.importorskip("lightning")

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from tests.support import support
from trainer_attrib import Ledger
from trainer_attrib.ledger.reader import StageReader

WORDS = [f"w{i}" for i in range(60)]
HUGGING_FACE = "from trainer_attrib.integrations.huggingface import AttributionCallback\n"
LIGHTNING = "from trainer_attrib.integrations.lightning import AttributionCallback\n"
CALLBACK = '\n        callbacks=[AttributionCallback("ledger", stage="one", strict=True)],'
TRAINING = {
    "output_dir": "out", "num_train_epochs": "2", "per_device_train_batch_size": "4", "learning_rate": "1e-3",
    "use_cpu": "true", "bf16": "false", "report_to": "none", "logging_steps": "1", "save_steps": "2",
    "disable_tqdm": "true",
}  # fmt: skip
FROM_MODEL = {"model_name_or_path": "model", "dataset_name": "data", "dtype": "float32"}
FROM_SCRATCH = {
    "config_name": "model", "tokenizer_name": "model", "train_file": "train.txt", "validation_file": "validation.txt",
    "block_size": "16", "do_train": "true",
}  # fmt: skip


@dataclass(frozen=True)
class Script:
    """A published script, where the import and the argument go, and how it is called."""

    place: str  # module of an installed package, or file below TRAINER_ATTRIB_EXAMPLES
    data: Callable[[], None]  # writes what the script reads into the current directory
    import_after: str
    argument_after: str
    import_line: str = HUGGING_FACE
    arguments: dict[str, str] = field(default_factory=dict)
    argument: str = CALLBACK

    def published(self) -> str:
        """The script as it is."""
        if not self.place.endswith(".py"):
            spec = importlib.util.find_spec(self.place)
            assert spec is not None
            assert spec.origin is not None
            return Path(spec.origin).read_text()
        folder = os.environ.get("TRAINER_ATTRIB_EXAMPLES")
        if not folder:
            pytest.skip("TRAINER_ATTRIB_EXAMPLES names no folder with copies of the frameworks' repositories")
        return (Path(folder) / self.place).read_text()

    def with_callback(self, text: str) -> str:
        """The script with one import and one argument more."""
        for place, added in ((self.import_after, self.import_line), (self.argument_after, self.argument)):
            assert text.count(place) == 1, f"{self.place} changed: {place!r} is not there once"
            text = text.replace(place, place + added)
        return text

    def run(self, folder: Path, *, recorded: bool) -> None:
        """Run it as ``python script.py --arguments`` would, in a folder with its data; with one import and one argument
        more if it is to be recorded."""
        text = self.published()
        if recorded:
            text = self.with_callback(text)
        folder.mkdir(parents=True)
        before, argv = Path.cwd(), sys.argv
        os.chdir(folder)
        try:
            self.data()
            Path("script.py").write_text(text)
            sys.argv = ["script.py", *(word for key, value in self.arguments.items() for word in (f"--{key}", value))]
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the script's own
                runpy.run_path("script.py", run_name="__main__")
        finally:
            os.chdir(before)
            sys.argv = argv


def sentences(count: int, length: int = 6) -> list[str]:
    generator = torch.Generator().manual_seed(0)
    picked = torch.randint(0, len(WORDS), (count, length), generator=generator).tolist()
    return [" ".join(WORDS[i] for i in row) for row in picked]


def small_model() -> None:
    """A GPT-2 and a tokenizer with one token per word, in ``model``."""
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<eos>", "<unk>", *WORDS])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", bos_token="<eos>", unk_token="<unk>",
        model_max_length=32,
    ).save_pretrained("model")  # fmt: skip
    sizes = {"vocab_size": len(vocabulary), "n_positions": 32, "n_embd": 16, "n_layer": 2, "n_head": 2}
    config = GPT2Config(**sizes, pad_token_id=0, bos_token_id=1, eos_token_id=1)
    torch.manual_seed(0)
    GPT2LMHeadModel(config).save_pretrained("model")


def write_rows(rows: list[dict[str, str]]) -> None:
    small_model()
    Path("data").mkdir()
    Path("data/train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def texts() -> None:
    write_rows([{"text": sentence} for sentence in sentences(12)])


def preferences() -> None:
    columns = zip(sentences(36)[::3], sentences(36)[1::3], sentences(36)[2::3], strict=True)
    write_rows([dict(zip(("prompt", "chosen", "rejected"), (p, " " + c, " " + r), strict=True)) for p, c, r in columns])


def text_file() -> None:
    """160 tokens: ten blocks of 16."""
    small_model()
    Path("train.txt").write_text("\n".join(sentences(40, 4)))
    Path("validation.txt").write_text("\n".join(sentences(10, 4)))


def wikitext(lines: int = 4042) -> None:
    """One block of 35 words less than lines; Lightning's script keeps 4000 of 4041 for validation and test."""
    Path("data").mkdir()
    Path("data/wikitext-2.txt").write_text("\n".join(sentences(lines, 34)))


TRL_SCRIPTS = {
    name: Script(
        f"trl.scripts.{name}", data, "import argparse\n", "peft_config=get_peft_config(model_args),",
        arguments=FROM_MODEL | TRAINING,
    )
    for name, data in (("sft", texts), ("dpo", preferences))
}  # fmt: skip
RUN_CLM = Script(
    "transformers/examples/pytorch/language-modeling/run_clm.py", text_file,
    "\nimport transformers\n", "data_collator=default_data_collator,", arguments=FROM_SCRATCH | TRAINING,
)  # fmt: skip
LIGHTNING_TRANSFORMER = Script(
    "pytorch-lightning/examples/pytorch/basics/transformer.py", wikitext,
    "import lightning as L\n", "L.Trainer(", LIGHTNING,
)  # fmt: skip


LIGHTNING_CLASSIFIER = Script(
    "pytorch-lightning/examples/pytorch/basics/backbone_image_classifier.py", lambda: None,
    "from lightning.pytorch.cli import LightningCLI\n", 'save_config_kwargs={"overwrite": True},', LIGHTNING,
    {
        "trainer.max_epochs": "1", "trainer.limit_train_batches": "6", "trainer.limit_val_batches": "1",
        "trainer.limit_test_batches": "1", "trainer.limit_predict_batches": "1", "trainer.accelerator": "cpu",
        "trainer.enable_progress_bar": "false",
    },
    argument=CALLBACK.replace("callbacks=[", 'trainer_defaults={"callbacks": [').replace("],", "]},"),
)  # fmt: skip


def stage_of(folder: Path) -> StageReader:
    stage = Ledger(folder / "ledger").stage("one")
    assert stage.meta["status"] == "complete"
    return stage


def logged(folder: Path) -> list[float]:
    """Every loss that a Hugging Face trainer logged."""
    last = max((folder / "out").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    log = json.loads((last / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in log if "loss" in entry]


@pytest.mark.parametrize("script", TRL_SCRIPTS.values(), ids=list(TRL_SCRIPTS))
def test_nothing_but_two_lines_is_added(script: Script) -> None:
    """What docs/recording.md shows."""
    published = script.published()
    changes = [*difflib.unified_diff(published.splitlines(), script.with_callback(published).splitlines(), n=0)][2:]
    assert [line for line in changes if not line.startswith("@@")] == [
        "+" + HUGGING_FACE.rstrip(),
        "+" + CALLBACK.strip("\n"),
    ]


@pytest.mark.parametrize(
    ("script", "examples"),
    [
        pytest.param(
            TRL_SCRIPTS["sft"], 12, marks=support("Training loops", "TRL's own script sft.py, one line added")
        ),
        pytest.param(
            TRL_SCRIPTS["dpo"], 12, marks=support("Training loops", "TRL's own script dpo.py, one line added")
        ),
        (RUN_CLM, 10),
    ],
    ids=lambda value: value.place.rsplit("/")[-1] if isinstance(value, Script) else "",
)
def test_scripts_for_the_hugging_face_trainers(script: Script, examples: int, tmp_path: Path) -> None:
    script.run(tmp_path / "plain", recorded=False)
    script.run(tmp_path / "recorded", recorded=True)
    plain, recorded = (tmp_path / kind / "out/model.safetensors" for kind in ("plain", "recorded"))
    assert plain.read_bytes() == recorded.read_bytes()
    assert logged(tmp_path / "plain") == logged(tmp_path / "recorded")
    assert len(set(logged(tmp_path / "plain"))) == 6  # 2 epochs of 3 steps
    stage = stage_of(tmp_path / "recorded")
    assert (stage.count("rows"), stage.count("examples"), stage.count("steps")) == (2 * examples, examples, 6)


def checkpoint(folder: Path) -> dict[str, Any]:
    (path,) = (folder / "lightning_logs/version_0/checkpoints").glob("*.ckpt")
    return torch.load(path, weights_only=True)


@support("Training loops", "Lightning's own LightningTransformer")
def test_the_language_model_that_lightning_ships(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its attention calls no layer of its own for the inputs' weights: coverage says so, the rest is recorded."""
    import lightning.pytorch as pl
    from lightning.pytorch.demos.transformer import LightningTransformer, WikiText2

    from trainer_attrib.integrations.lightning import AttributionCallback

    class Offline(LightningTransformer):
        def prepare_data(self) -> None:
            """The text is there."""

        def train_dataloader(self) -> Any:
            return torch.utils.data.DataLoader(WikiText2(download=False), batch_size=3)

    monkeypatch.chdir(tmp_path)
    wikitext(9)
    weights = []
    for callbacks in ([], [AttributionCallback(tmp_path / "ledger", stage="one", strict=True)]):
        pl.seed_everything(0, verbose=False)
        model = Offline(vocab_size=len(WORDS) + 1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pl.Trainer(
                max_epochs=2, callbacks=callbacks, logger=False, enable_checkpointing=False, accelerator="cpu",
                enable_progress_bar=False, enable_model_summary=False,
            ).fit(model)  # fmt: skip
        weights.append(model.state_dict())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    stage = stage_of(tmp_path)
    assert (stage.count("rows"), stage.count("examples"), stage.count("steps")) == (16, 8, 6)
    assert 0.2 < stage.meta["coverage"]["share"] < 0.7
    assert max(stage.steps()["audit_residual"].to_pylist()) < 1e-3


@pytest.mark.slow
def test_lightnings_language_model(tmp_path: Path) -> None:
    LIGHTNING_TRANSFORMER.run(tmp_path / "plain", recorded=False)
    LIGHTNING_TRANSFORMER.run(tmp_path / "recorded", recorded=True)
    plain, recorded = (checkpoint(tmp_path / kind)["state_dict"] for kind in ("plain", "recorded"))
    assert all(torch.equal(plain[name], recorded[name]) for name in plain)
    stage = stage_of(tmp_path / "recorded")
    assert (stage.count("rows"), stage.count("examples"), stage.count("steps")) == (20 * 41, 41, 60)


def images(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Made-up digits where the script looks for MNIST, and the one name of torchvision that it uses."""
    place = folder / "Datasets" / "MNIST" / "complete"
    place.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    for name, count in (("training", 60_000), ("test", 64)):
        pixels = torch.randint(0, 256, (count, 28, 28), dtype=torch.uint8, generator=generator)
        torch.save((pixels, torch.randint(10, (count,), generator=generator)), place / f"{name}.pt")
    monkeypatch.setitem(sys.modules, "torchvision", SimpleNamespace(transforms=SimpleNamespace(ToTensor=object)))
    monkeypatch.setattr("lightning.pytorch.utilities.imports._TORCHVISION_AVAILABLE", True)
    monkeypatch.setenv("PL_USE_MOCKED_MNIST", "1")


def test_lightnings_image_classifier(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    LIGHTNING_CLASSIFIER.published()
    pytest.importorskip("jsonargparse")
    images(monkeypatch, tmp_path)
    LIGHTNING_CLASSIFIER.run(tmp_path / "run" / "plain", recorded=False)
    LIGHTNING_CLASSIFIER.run(tmp_path / "run" / "recorded", recorded=True)
    plain, recorded = (checkpoint(tmp_path / "run" / kind)["state_dict"] for kind in ("plain", "recorded"))
    assert all(torch.equal(plain[name], recorded[name]) for name in plain)
    stage = stage_of(tmp_path / "run" / "recorded")
    assert (stage.count("rows"), stage.count("examples"), stage.count("steps")) == (6 * 32, 6 * 32, 6)
    assert stage.meta["coverage"]["share"] == 1.0
