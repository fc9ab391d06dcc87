"""Defects that other recorders of per-example gradients had inside the Hugging Face Trainer: one test for each."""

from __future__ import annotations

import ast
import copy
import json
import re
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.optim import SGD

from tests.support import support
from trainer_attrib import Analyzer, Behavior, SketchConfig
from trainer_attrib.cli import main
from trainer_attrib.ledger.reader import Ledger, StageReader
from trainer_attrib.tap.plan import SketchPlan
from trainer_attrib.tap.projections import Projections
from trainer_attrib.testing.oracle import example_gradients, project_gradient

datasets = pytest.importorskip("datasets")
transformers = pytest.importorskip("transformers")

from trainer_attrib.integrations.huggingface import AttributionCallback  # noqa: E402

PACKAGE = Path(__file__).parents[2] / "trainer_attrib"
RAW = SketchConfig(rank=8, dtype="float32", correction="none")


@pytest.fixture
def fit(tmp_path: Path, token_rows: Callable, pad_collator: Callable, tiny_gpt2: Callable) -> Callable[..., Any]:
    """Trains on 12 rows in batches of 4, recorded; returns the trainer and the stage."""

    def run(
        ledger: Any = tmp_path / "ledger",
        *,
        model: Any = None,
        data: Any = None,
        collate: Any = None,
        sketch: SketchConfig | None = None,
        callbacks: tuple[Any, ...] = (),
        optimizers: Callable[[Any], Any] | None = None,
        resume: bool = False,
        **settings: Any,
    ) -> tuple[Any, StageReader]:
        model = tiny_gpt2() if model is None else model
        rows = [{"id": f"row-{i}", **row} for i, row in enumerate(token_rows())]
        defaults = {
            "per_device_train_batch_size": 4, "num_train_epochs": 2, "learning_rate": 1e-3, "save_strategy": "no",
            "report_to": [], "disable_tqdm": True, "use_cpu": True, "logging_strategy": "no",
        }  # fmt: skip
        trainer = transformers.Trainer(
            model,
            transformers.TrainingArguments(str(tmp_path / "out"), **{**defaults, **settings}),
            train_dataset=datasets.Dataset.from_list(rows) if data is None else data,
            data_collator=collate or pad_collator(),
            callbacks=[AttributionCallback(ledger, stage="one", sketch=sketch, strict=True), *callbacks],
            optimizers=(optimizers(model.parameters()), None) if optimizers else (None, None),
        )
        trainer.train(resume_from_checkpoint=resume)
        return trainer, Ledger(ledger).stage("one")

    return run


def rows_of(stage: StageReader) -> tuple[list[dict[str, Any]], np.ndarray]:
    """The table of all rows and their gradients' sketches [N, width]."""
    blocks = list(stage.rows())
    table = [row for block in blocks for row in block.table.to_pylist()]
    units = np.concatenate([np.asarray(block.sketches, np.float64) for block in blocks])
    return table, units * np.array([row["norm"] for row in table])[:, None]


def medians(table: list[dict[str, Any]]) -> dict[int, list[float]]:
    """Version of the second moments -> median norm of each step's rows."""
    found: dict[int, dict[int, list[float]]] = {}
    for row in table:
        found.setdefault(row["version"], {}).setdefault(row["step"], []).append(row["norm"] / row["tokens"])
    return {version: [float(np.median(norms)) for norms in steps.values()] for version, steps in found.items()}


def test_1_the_scale_of_rows_is_steady_over_the_first_steps(fit: Callable, tmp_path: Path) -> None:
    """Second moments that are stale by a step, or not bias-corrected, made norms fall a thousandfold in ten steps."""
    small = {"learning_rate": 1e-5, "max_steps": 10, "lr_scheduler_type": "constant"}
    _, raw = fit(tmp_path / "raw", sketch=RAW, **small)
    _, corrected = fit(tmp_path / "corrected", sketch=SketchConfig(rank=8), **small)
    (raw_norms,) = medians(rows_of(raw)[0]).values()
    assert max(raw_norms) / min(raw_norms) < 2
    by_version = medians(rows_of(corrected)[0])
    assert {version: len(norms) for version, norms in by_version.items()} == {0: 4, 1: 6}
    norms = [*by_version[0], *by_version[1]]
    assert max(norms) / min(norms) < 2


def test_2_a_schedule_that_ends_at_zero_leaves_every_example_to_be_found(fit: Callable, token_rows: Callable) -> None:
    """Rows scaled by a learning rate of 0 all scored 0."""
    trainer, stage = fit(num_train_epochs=3)
    rates = [rate[0] for rate in stage.steps()["learning_rate"].to_pylist()]
    assert rates[0] == pytest.approx(1e-3)
    assert rates == sorted(rates, reverse=True)
    assert trainer.lr_scheduler.get_last_lr()[0] == 0.0
    assert np.isfinite(rows_of(stage)[1]).all()

    def log_probability(model: Any, items: list[Any]) -> torch.Tensor:
        tokens = [torch.tensor([item]) for item in items]
        return torch.stack([-model(input_ids=t, labels=t).loss * (t.shape[1] - 1) for t in tokens])

    behavior = Behavior("itself", [row["input_ids"] for row in token_rows()], log_probability, batch_size=1)
    found = Analyzer(stage._storage.url, trainer.model).influence([behavior])
    assert np.isfinite(found.scores).all()
    assert [found.examples.ids[i] for i in found.scores.argmax(1)] == [f"row-{i}" for i in range(12)]


def test_3_every_epoch_is_kept(fit: Callable, tmp_path: Path) -> None:
    """A later epoch used to replace an earlier one: at standing weights, three epochs are three times one."""
    still = {"optimizers": lambda p: SGD(p, lr=0.0), "sketch": RAW}
    sums = []
    for epochs in (1, 3):
        _, stage = fit(tmp_path / f"{epochs}", num_train_epochs=epochs, **still)
        table, gradients = rows_of(stage)
        assert Counter(row["example"] for row in table) == {f"row-{i}": epochs for i in range(12)}
        names = np.array([row["example"] for row in table])
        sums.append(np.stack([gradients[names == f"row-{i}"].sum(0) for i in range(12)]))
    np.testing.assert_allclose(sums[1], 3 * sums[0], rtol=0, atol=1e-4 * np.abs(sums[0]).max())


def test_4_resuming_loses_no_row(fit: Callable) -> None:
    """Half of the rows used to be zeros afterwards."""

    class BreaksOff(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 4:
                raise KeyboardInterrupt

    saving = {"save_strategy": "steps", "save_steps": 2, "sketch": RAW, "num_train_epochs": 3}
    with pytest.raises(KeyboardInterrupt):
        fit(callbacks=(BreaksOff(),), **saving)
    _, stage = fit(resume=True, **saving)
    table, gradients = rows_of(stage)
    assert Counter(row["step"] for row in table) == dict.fromkeys(range(1, 10), 4)
    assert Counter(row["example"] for row in table) == {f"row-{i}": 3 for i in range(12)}
    assert (np.linalg.norm(gradients, axis=1) > 0).all()


def test_5_a_run_that_ends_in_mid_epoch_is_whole(fit: Callable) -> None:
    """Rows of examples that were not reached used to be zeros, and the run could not be opened."""
    trainer, stage = fit(max_steps=4, sketch=RAW)
    table, gradients = rows_of(stage)
    assert len(table) == 16
    assert (np.linalg.norm(gradients, axis=1) > 0).all()
    assert stage.meta["status"] == "complete"
    assert Analyzer(stage._storage.url, trainer.model).lineage[0].name == "one"


@pytest.mark.parametrize("optim", ["sgd", "adamw_8bit", "lion_32bit"])
def test_6_an_optimizer_that_gives_no_correction_is_reported(optim: str, fit: Callable, caplog: Any) -> None:
    """Before the first step, and in the stage for good."""
    if optim != "sgd":
        pytest.importorskip("bitsandbytes")
    caplog.set_level("INFO", logger="trainer_attrib")
    _, stage = fit(optim=optim, max_steps=2)
    assert "rows are raw gradients" in stage.meta["correction_unavailable"]
    said = [record.getMessage() for record in caplog.records if record.name == "trainer_attrib"]
    reported = next(i for i, line in enumerate(said) if "correction unavailable" in line)
    assert reported < next(i for i, line in enumerate(said) if "layers fired" in line)


def test_7_the_command_line_opens_what_the_callback_wrote(fit: Callable, tmp_path: Path, capsys: Any) -> None:
    """It used to look for a file that only its own way of recording writes."""
    fit(max_steps=2)
    capsys.readouterr()  # what the trainer printed
    for command in ("inspect", "verify"):
        assert main([command, str(tmp_path / "ledger"), "--json"]) == 0
        assert "one" in json.dumps(json.loads(capsys.readouterr().out)["stages"])


def test_8_a_row_does_not_depend_on_its_batch(fit: Callable, tmp_path: Path) -> None:
    """The trainer divides by the tokens of the whole batch; the row has that undone, and says what it was."""
    found = []
    for size in (6, 3):
        _, stage = fit(tmp_path / f"{size}", per_device_train_batch_size=size, num_train_epochs=1, sketch=RAW,
                       optimizers=lambda p: SGD(p, lr=0.0))  # fmt: skip
        table, gradients = rows_of(stage)
        assert {row["denominator_source"] for row in table} == {"measured"}
        found.append(
            {row["example"]: (gradient, row["denominator"]) for row, gradient in zip(table, gradients, strict=True)}
        )
    for example, (gradient, denominator) in found[0].items():
        other, smaller = found[1][example]
        assert denominator > smaller
        assert np.linalg.norm(other - gradient) < 1e-5 * np.linalg.norm(gradient)


class Plain(torch.utils.data.Dataset):
    """A map-style set that is no more than that."""

    def __init__(self, rows: list[Any]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        return self.rows[index]


@pytest.mark.parametrize("kind", ["torch", "stream"])
def test_9_torch_sets_and_streams_are_recorded(kind: str, fit: Callable, token_rows: Callable) -> None:
    """They used to fail for want of a method or of a length."""
    data = Plain(token_rows()) if kind == "torch" else datasets.Dataset.from_list(token_rows()).to_iterable_dataset()
    _, stage = fit(data=data, max_steps=6, sketch=RAW)
    counts = Counter(row["example"] for row in rows_of(stage)[0])
    assert sorted(counts.values()) == [2] * 12


class ClassLabels:
    """Pads, and labels a row by its length."""

    def __init__(self, pad: Callable) -> None:
        self.pad = pad

    def __call__(self, items: list[Any]) -> dict[str, torch.Tensor]:
        batch = self.pad(items)
        return {**batch, "labels": batch["attention_mask"].sum(1) % 3}


@support("Layers", "BERT, with a head on one vector per example")
def test_10_a_classifier_with_one_vector_per_example_is_recorded(
    fit: Callable, token_rows: Callable, pad_collator: Callable, close: Callable
) -> None:
    """Activations [B, H] behind the pooler, [B, S, H] before it; both used to be taken for the latter."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 29, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    drops = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model = transformers.BertForSequenceClassification(
        transformers.BertConfig(**sizes, **drops, intermediate_size=24, num_labels=3, max_position_embeddings=16)
    ).train()
    start, collate = copy.deepcopy(model), ClassLabels(pad_collator())
    rows = [{"id": str(i), **row} for i, row in enumerate(token_rows())]
    _, stage = fit(model=model, data=datasets.Dataset.from_list(rows), collate=collate, max_steps=1, sketch=RAW)
    table, gradients = rows_of(stage)
    plan = SketchPlan.from_dict(stage.meta["plan"])
    assert {"bert.pooler.dense.weight", "classifier.weight"} <= {weight.name for weight in plan.weights}
    keep = torch.ones(plan.width, dtype=torch.bool)
    for weight in plan.weights:
        keep[weight.span] = weight.name not in stage.meta["coverage"]["partial"]
        assert keep[weight.span].all() == ("position_embeddings" not in weight.name)  # looked up once for the batch
    projections = Projections(plan, start)
    for row, gradient in zip(table, gradients, strict=True):
        batch = collate([rows[int(row["example"])]])

        def losses_of(batch: Any = batch) -> torch.Tensor:
            logits = start(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
            return F.cross_entropy(logits, batch["labels"], reduction="none")

        exact = project_gradient(plan, projections, example_gradients(start, losses_of)[0])
        close(torch.tensor(gradient)[keep].float(), exact[keep], relative=1e-5)


def test_11_scores_need_no_index_library(fit: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """Queries used to ask for a GPU build of one, and to fail with its CPU build."""
    for name in ("faiss", "faiss.contrib", "hnswlib", "annoy"):
        monkeypatch.setitem(sys.modules, name, None)
    trainer, stage = fit(max_steps=3)
    tokens = [[3, 4, 5], [6, 7, 8]]
    behavior = Behavior("anything", tokens, lambda model, items: -model(
        input_ids=torch.tensor(items), labels=torch.tensor(items)).loss.expand(len(items)))  # fmt: skip
    found = Analyzer(stage._storage.url, trainer.model).influence([behavior])
    assert found.scores.shape == (2, 12)
    assert np.isfinite(found.scores).all()


@pytest.mark.parametrize("kind", [str, Path], ids=["str", "Path"])
@pytest.mark.parametrize("place", ["deep/er/ledger", "ledger"])
def test_12_a_ledger_s_place_is_a_string_or_a_path(
    kind: type, place: str, fit: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Relative, as documentation writes it, and in a folder that does not exist yet."""
    monkeypatch.chdir(tmp_path)
    _, stage = fit(kind(place), max_steps=1)
    assert (tmp_path / place / "stages" / "one" / "stage.json").exists()
    assert stage.count("rows") == 4


def test_12_messages_name_commands_that_exist() -> None:
    """An error used to advise a function that was nowhere."""
    advised: set[str] = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                advised |= set(re.findall(r"`trainer-attrib ([a-z]+)", node.value))
    assert "verify" in advised
    for command in advised:
        with pytest.raises(SystemExit, match="0"):
            main([command, "--help"])
