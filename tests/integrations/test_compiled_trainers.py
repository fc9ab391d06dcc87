"""The callbacks on compiled models: the eager run's rows, the graphs and the training of the run without them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from tests.support import support
from trainer_attrib.integrations.huggingface import AttributionCallback as TrainerCallback
from trainer_attrib.integrations.lightning import AttributionCallback as LightningCallback
from trainer_attrib.ledger.reader import Ledger
from trainer_attrib.types import SketchConfig

pytestmark = pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor:UserWarning",  # dynamo's own, which it hides
    "ignore:.*does not have many workers.*:UserWarning",
    "ignore:.*Starting from v1.9.0.*:UserWarning",
)
SKETCH = SketchConfig(rank=4, dtype="float32")


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """No compiled code from other tests."""
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


class Run:
    """A training run: its rows if recorded, its last weights, how many graphs and breaks it made."""

    def __init__(self, model: nn.Module, ledger: Path | None) -> None:
        self.weights = [p.detach().clone() for p in model.parameters()]
        self.graphs = counters["stats"]["unique_graphs"]
        self.breaks = sum(counters["graph_break"].values())
        torch._dynamo.reset()
        counters.clear()
        self.rows: dict[tuple[int, str], np.ndarray] = {}
        if ledger is not None:
            stage = Ledger(ledger).stage("one")
            self.coverage = stage.meta["coverage"]
            for block in stage.rows():
                for row, sketch in zip(block.table.to_pylist(), block.sketches, strict=True):
                    self.rows[row["step"], row["example"]] = sketch * row["norm"]


def _check(alone: Run, recorded: Run, eager: Run, close: Callable, rows: int) -> None:
    assert (recorded.graphs, recorded.breaks) == (alone.graphs, alone.breaks)
    assert recorded.graphs > 0
    assert all(torch.equal(a, b) for a, b in zip(alone.weights, recorded.weights, strict=True))
    assert recorded.rows.keys() == eager.rows.keys()
    assert len(recorded.rows) == rows
    assert recorded.coverage == eager.coverage
    close(*(torch.from_numpy(np.stack([run.rows[key] for key in eager.rows])) for run in (recorded, eager)))


@support("Precision and compilation", "torch.compile: `TrainingArguments(torch_compile=True)`")
@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_trainer_that_compiles(
    backend: str, tmp_path: Path, token_rows: Callable, pad_collator: Callable, close: Callable
) -> None:
    """Llama with gradient checkpointing, accumulation and clipping; the last micro-batch is smaller."""

    def run(name: str, *, compiled: bool, recorded: bool) -> Run:
        torch.manual_seed(0)
        sizes = {"vocab_size": 29, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
        model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1, pad_token_id=0))
        arguments = TrainingArguments(
            output_dir=str(tmp_path / "output"), per_device_train_batch_size=4, gradient_accumulation_steps=2,
            num_train_epochs=1, max_grad_norm=0.5, gradient_checkpointing=True, save_strategy="no", report_to=[],
            disable_tqdm=True, use_cpu=True, torch_compile=compiled,
            torch_compile_backend=backend if compiled else None,
        )  # fmt: skip
        callback = TrainerCallback(tmp_path / name, stage="one", sketch=SKETCH, strict=True)
        callbacks = [callback] if recorded else []
        Trainer(
            model, arguments, train_dataset=token_rows(10), data_collator=pad_collator(), callbacks=callbacks
        ).train()
        return Run(model, tmp_path / name if recorded else None)

    alone = run("alone", compiled=True, recorded=False)
    _check(
        alone,
        run("compiled", compiled=True, recorded=True),
        run("eager", compiled=False, recorded=True),
        close,
        rows=10,
    )


class Lit(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.body(x)))

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return nn.functional.cross_entropy(self(batch["x"]), batch["y"])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


@support("Precision and compilation", "torch.compile: a LightningModule")
def test_a_compiled_lightning_module(tmp_path: Path, close: Callable) -> None:
    """The whole training step is one graph, the model's own hooks inside it; the last batch is smaller."""

    def run(name: str, *, compiled: bool, recorded: bool) -> Run:
        torch.manual_seed(0)
        module: Any = Lit()
        items = [{"id": str(i), "x": torch.randn(6), "y": i % 3} for i in range(10)]
        callback = LightningCallback(tmp_path / name, stage="one", sketch=SKETCH, strict=True)
        trainer = pl.Trainer(
            max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, callbacks=[callback] if recorded else [],
        )  # fmt: skip
        fitted = torch.compile(module, backend="aot_eager") if compiled else module
        trainer.fit(fitted, torch.utils.data.DataLoader(items, batch_size=4))
        return Run(module, tmp_path / name if recorded else None)

    alone = run("alone", compiled=True, recorded=False)
    _check(
        alone,
        run("compiled", compiled=True, recorded=True),
        run("eager", compiled=False, recorded=True),
        close,
        rows=20,
    )
