"""Wherever the data come from, each example that trained is there once per pass, its own gradient beside its id."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim import SGD
from torch.utils.data import Dataset, IterableDataset

from tests.support import support
from trainer_attrib.capture.example_ids import hash_rows, id_strings
from trainer_attrib.ledger.reader import Ledger
from trainer_attrib.testing.reference import Expected, reference_steps
from trainer_attrib.testing.run import Example, Run, Trained, collate, make_examples

datasets = pytest.importorskip("datasets")
transformers = pytest.importorskip("transformers")

from tests.integrations import test_contract as contract  # noqa: E402
from trainer_attrib.integrations.huggingface import AttributionCallback  # noqa: E402

EXAMPLES = [{**example, "length": (7 * i) % 10} for i, example in enumerate(make_examples())]


def record(run: Run, data: Any, **settings: Any) -> list[str]:
    """Train at standing weights, check every row against its example's own gradient, return the ids in order."""
    model = run.model()
    defaults: dict[str, Any] = {
        "per_device_train_batch_size": run.batch_size, "num_train_epochs": 2, "save_strategy": "no", "report_to": [],
        "disable_tqdm": True, "use_cpu": True,
    }  # fmt: skip
    transformers.Trainer(
        model,
        transformers.TrainingArguments(str(run.folder / "out"), **{**defaults, **settings}),
        train_dataset=data,
        data_collator=inputs,
        callbacks=[AttributionCallback(run.ledger, stage="one", sketch=run.sketch, strict=True)],  # type: ignore[arg-type]
        optimizers=(SGD(model.parameters(), lr=0.0), None),
    ).train()
    stage = Ledger(run.ledger).stage("one")  # type: ignore[arg-type]
    assert stage.meta["status"] == "complete"
    expected, own = Expected(run, stage), gradients_by_name(run)
    names = []
    for block in stage.rows():
        for row, sketch in zip(block.table.to_pylist(), block.sketches, strict=True):
            exact = expected.row(own[row["example"]])
            assert float((torch.tensor(sketch) * row["norm"] - exact).norm() / exact.norm()) < 1e-6
            names.append(row["example"])
    return names


def inputs(items: list[Example]) -> dict[str, torch.Tensor]:
    """What the model takes of a batch."""
    return {key: value for key, value in collate(items).items() if key != "id"}


def gradients_by_name(run: Run) -> dict[str, Any]:
    """Every example's own gradient, by its id and by its content."""
    (step,) = reference_steps(Run(run.folder, epochs=1, batch_size=len(run.examples), examples=run.examples))
    own = dict(step.examples[0])
    return own | {content: own[name] for name, content in contents(run.examples).items()}


def contents(examples: Any) -> dict[str, str]:
    """Id -> hash of the content."""
    batch = collate(examples)
    hashes = id_strings(hash_rows(batch["input_ids"], None, batch["labels"]))
    return dict(zip(batch["id"], hashes, strict=True))


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path, tmp_path / "ledger", examples=EXAMPLES)


LOADERS = {
    "group_by_length": {"train_sampling_strategy": "group_by_length", "remove_unused_columns": False},
    "batch_rebalance": {"train_sampling_strategy": "batch_rebalance", "remove_unused_columns": False},
    "persistent workers": {"dataloader_num_workers": 2, "dataloader_persistent_workers": True},
}


@pytest.mark.parametrize("name", [pytest.param(name, marks=support("Data", name)) for name in LOADERS])
def test_named_examples_under_every_way_of_loading(name: str, run: Run) -> None:
    names = record(run, datasets.Dataset.from_list(EXAMPLES), **LOADERS[name])
    assert Counter(names) == Counter(2 * [example["id"] for example in EXAMPLES])
    if name == "group_by_length":  # the longest comes first
        assert {names[0], names[10]} == {example["id"] for example in EXAMPLES if example["length"] == 9}


@support("Data", "drop_last")
def test_dropped_examples_have_no_rows(run: Run) -> None:
    names = record(run, datasets.Dataset.from_list(EXAMPLES), dataloader_drop_last=True)
    assert len(names) == 16
    assert all(len(set(names[start : start + 8])) == 8 for start in (0, 8))


class TorchSet(Dataset):
    """Map-style, with nothing but what torch asks for."""

    def __init__(self, rows: list[Example]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Example:
        return self.rows[index]


class TorchStream(IterableDataset):
    """Without a length."""

    def __init__(self, rows: list[Example]) -> None:
        self.rows = rows

    def __iter__(self) -> Iterator[Example]:
        return iter(self.rows)


def endless() -> Iterator[Example]:
    return itertools.cycle(EXAMPLES)


def streaming(examples: Callable[[], Iterator[Example]]) -> Any:
    """A set of datasets without a length, whose columns are known."""
    return datasets.IterableDataset.from_generator(examples, datasets.Dataset.from_list(EXAMPLES).features)


SETS: dict[str, tuple[str, Callable[[], Any]]] = {
    "torch Dataset": ("torch's Dataset", lambda: TorchSet(EXAMPLES)),
    "torch IterableDataset": ("torch's IterableDataset", lambda: TorchStream(EXAMPLES)),
    "stream": ("streaming sets of datasets", lambda: datasets.Dataset.from_list(EXAMPLES).to_iterable_dataset()),
    "generator": ("streaming sets of datasets", lambda: streaming(lambda: iter(EXAMPLES))),
    "endless stream": ("endless streams with an id column", lambda: streaming(endless)),
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", [pytest.param(name, marks=support("Data", row)) for name, (row, _) in SETS.items()])
def test_sets_without_names_go_by_content(name: str, run: Run) -> None:
    """Two passes of three batches each; a stream is read once, as training reads it, even if it has an id column."""
    limit = {} if name == "torch Dataset" else {"max_steps": 5 if name == "endless stream" else 6}
    names = record(run, SETS[name][1](), **limit)
    assert Counter(names) == Counter(2 * list(contents(EXAMPLES).values()))


@support("Data", "resume in mid-epoch, loader workers")
def test_resuming_in_mid_epoch_with_workers(tmp_path: Path) -> None:
    """Broken off after step 5, resumed from the checkpoint of step 4, with 3 steps to an epoch: every row once."""

    class WithWorkers(contract.TestHuggingFace):
        def train(self, run: Run) -> Trained:
            return super().train(replace(run, workers=2))

    WithWorkers().test_a_resumed_run_has_every_row_once(tmp_path)


@support("Data", "max_steps in mid-epoch")
def test_max_steps_in_mid_epoch(run: Run) -> None:
    names = record(run, datasets.Dataset.from_list(EXAMPLES), max_steps=4)
    assert Counter(names[:10]) == Counter(example["id"] for example in EXAMPLES)
    assert len(names) == 14
