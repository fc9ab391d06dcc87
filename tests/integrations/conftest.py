"""Trains a tiny model by a trainer of TRL, recorded, and compares each row with a gradient of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from trainer_attrib.ledger.reader import Ledger, StageReader
from trainer_attrib.tap.names import parameters_by_name
from trainer_attrib.tap.plan import SketchPlan
from trainer_attrib.tap.projections import Projections
from trainer_attrib.testing.oracle import project_gradient
from trainer_attrib.types import SketchConfig

WORDS = [f"w{i}" for i in range(25)]
SKETCH = SketchConfig(rank=4, dtype="float32", correction="none")


@pytest.fixture
def tokenizer() -> Any:
    """One token per word, no download."""
    transformers, tokenizers = pytest.importorskip("transformers"), pytest.importorskip("tokenizers")
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<eos>", "<unk>", *WORDS])}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", bos_token="<eos>", unk_token="<unk>"
    )


@pytest.fixture
def words() -> Callable[[int], str]:
    """Makes texts of 2 to n random words."""
    random = np.random.default_rng(0)
    return lambda longest: " ".join(random.choice(WORDS, random.integers(2, longest + 1)))


@pytest.fixture
def tiny_llama() -> Callable[..., Any]:
    """Makes Llamas of 2 layers and width 16, without dropout, or another head on one."""
    transformers = pytest.importorskip("transformers")

    def make(seed: int = 0, kind: str = "LlamaForCausalLM", **settings: Any) -> Any:
        torch.manual_seed(seed)
        sizes = {"vocab_size": 28, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
        heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "pad_token_id": 0, "eos_token_id": 1}
        return getattr(transformers, kind)(transformers.LlamaConfig(**sizes, **heads, **settings))

    return make


@dataclass
class Trained:
    """A recorded run whose model is back at its initial weights.

    Args:
        trainer: that trained.
        model: in train mode.
        stage: what was recorded.
    """

    trainer: Any
    model: Any
    stage: StageReader

    @cached_property
    def table(self) -> list[dict[str, Any]]:
        """The rows' own columns."""
        return [row for block in self.stage.rows() for row in block.table.to_pylist()]

    @cached_property
    def sketches(self) -> torch.Tensor:
        """Each row's gradient of its own loss [N, width], of the weights that are captured in full."""
        unit = torch.from_numpy(np.concatenate([np.array(block.sketches) for block in self.stage.rows()]))
        assert not unit[:, ~self._kept].any()
        return unit[:, self._kept] * torch.tensor([row["norm"] for row in self.table])[:, None]

    @cached_property
    def texts(self) -> dict[str, str]:
        """Text by example."""
        return {row["example"]: row["text"] for row in self.stage.examples().to_pylist()}

    @property
    def residual(self) -> float:
        """The worst audit of any step."""
        return max(self.stage.steps()["audit_residual"].to_pylist())

    def gradient(self, loss: Callable[[], torch.Tensor]) -> torch.Tensor:
        """A loss's gradient at the initial weights, projected and kept like a row."""
        self.model.zero_grad()
        loss().backward()
        named = parameters_by_name(self.model).items()
        whole = {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in named}
        self.model.zero_grad()
        return project_gradient(self._plan, Projections(self._plan, self.model), whole)[self._kept]

    def likelihood(self, tokens: list[int], start: int = 1) -> torch.Tensor:
        """Summed log-probability of the tokens from ``start`` on, the text being alone."""
        row = torch.tensor([tokens])
        found = self.model(input_ids=row).logits[0, :-1].log_softmax(-1)
        return found.gather(-1, row[0, 1:, None])[start - 1 :].sum()

    @cached_property
    def _plan(self) -> SketchPlan:
        return SketchPlan.from_dict(self.stage.meta["plan"])

    @cached_property
    def _kept(self) -> torch.Tensor:
        kept = torch.ones(self._plan.width, dtype=torch.bool)
        for weight in self._plan.weights:
            kept[weight.span] = weight.name not in self.stage.meta["coverage"]["partial"]
        return kept


@pytest.fixture
def settings(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Settings of one step over two micro-batches of two examples on the CPU, with changes."""

    def make(**changes: Any) -> dict[str, Any]:
        defaults = {
            "output_dir": str(tmp_path / "output"), "max_steps": 1, "per_device_train_batch_size": 2, "report_to": [],
            "gradient_accumulation_steps": 2, "learning_rate": 1e-3, "save_strategy": "no", "use_cpu": True,
            "bf16": False, "disable_tqdm": True, "gradient_checkpointing": False, "max_grad_norm": 0.1,
        }  # fmt: skip
        return defaults | changes

    return make


@pytest.fixture
def trained(tmp_path: Path) -> Callable[..., Trained]:
    """Trains what ``make_trainer`` makes with the callback it is given, and puts the weights back."""
    from trainer_attrib.integrations.huggingface import AttributionCallback

    def run(make_trainer: Callable[[list[Any]], Any]) -> Trained:
        trainer = make_trainer([AttributionCallback(tmp_path / "ledger", stage="one", strict=True, sketch=SKETCH)])
        model = trainer.model
        initial = {name: p.detach().clone() for name, p in model.named_parameters()}
        trainer.train()
        model.load_state_dict(initial, strict=False)
        model.train()
        stage = Ledger(tmp_path / "ledger").stage("one")
        assert stage.meta["status"] == "complete"
        return Trained(trainer, model, stage)

    return run
