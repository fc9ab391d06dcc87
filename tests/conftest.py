"""Offline, one thread, fixed seeds; a tiny language model and a tiny language data set."""

from __future__ import annotations

import os

# Before any import of a framework, which reads these once.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

import logging
import random
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.register_assert_rewrite("trainer_attrib.testing.contract")

from tests.support import pytest_addoption, pytest_configure  # noqa: E402

__all__ = ["pytest_addoption", "pytest_configure"]  # hooks of the support table

torch.set_num_threads(1)

VOCABULARY, PAD = 29, 0
LONGEST = {
    "test_demo", "test_processes", "test_examples", "test_compiled_trainers", "test_tutorials", "test_published_page",
}  # fmt: skip
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first, so that no process has one of them to itself at the end."""
    items.sort(key=lambda item: item.path.stem not in LONGEST)


@pytest.fixture(autouse=True)
def fixed_seeds() -> Iterator[None]:
    """Every test starts from the same random state, and from the library's default logging."""
    random.seed(0)
    np.random.seed(0)  # the trainers' own generator
    torch.manual_seed(0)
    logger = logging.getLogger("trainer_attrib")
    handlers, propagate, level = list(logger.handlers), logger.propagate, logger.level
    logger.handlers, logger.propagate = [], True
    yield
    logger.handlers, logger.propagate, logger.level = handlers, propagate, level


@pytest.fixture(params=[torch.float32, torch.float64], ids=["float32", "float64"])
def dtype(request: pytest.FixtureRequest) -> Iterator[torch.dtype]:
    """Both precisions, set as torch's default."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(request.param)
    yield request.param
    torch.set_default_dtype(before)


@pytest.fixture
def float64() -> Iterator[None]:
    """Double precision as torch's default."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@pytest.fixture
def close() -> Callable[..., None]:
    """Asserts equality of two tensors relative to the size of the second."""

    def check(found: torch.Tensor, expected: torch.Tensor, relative: float | None = None) -> None:
        relative = TOLERANCE[expected.dtype] if relative is None else relative
        assert found.shape == expected.shape
        assert torch.isfinite(found).all()
        assert float(expected.norm()) > 0, "comparing with zeros proves nothing"
        assert float((found.to(expected) - expected).norm() / expected.norm()) < relative

    return check


@pytest.fixture
def tiny_gpt2() -> Callable[..., Any]:
    """Makes GPT-2s of 2 layers and width 24: Conv1D layers, a tied head, broadcast positions."""
    transformers = pytest.importorskip("transformers")

    def make(seed: int = 0, dropout: float = 0.0, **settings: Any) -> Any:
        torch.manual_seed(seed)
        sizes = {"vocab_size": VOCABULARY, "n_positions": 32, "n_embd": 24, "n_layer": 2, "n_head": 2} | settings
        drops = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), dropout)
        return transformers.GPT2LMHeadModel(
            transformers.GPT2Config(**sizes, **drops, pad_token_id=PAD, bos_token_id=1, eos_token_id=1)
        )

    return make


@pytest.fixture
def token_rows() -> Callable[..., list[dict[str, list[int]]]]:
    """Makes rows of 4 to 10 random tokens without padding, all different."""

    def make(count: int = 12, seed: int = 0) -> list[dict[str, list[int]]]:
        random_state = np.random.default_rng(seed)
        return [
            {"input_ids": random_state.integers(2, VOCABULARY, random_state.integers(4, 11)).tolist()}
            for _ in range(count)
        ]

    return make


@pytest.fixture
def pad_collator() -> Callable[..., Any]:
    """A collator that pads on one side and labels what is not padding; picklable, for loader workers."""
    return PadCollator


class PadCollator:
    """Pads token rows to the longest of the batch."""

    def __init__(self, side: str = "right") -> None:
        self.side = side

    def __call__(self, items: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """input_ids, attention_mask and labels [B, S]."""
        length = max(len(item["input_ids"]) for item in items)
        padded = [self._padded(item["input_ids"], length) for item in items]
        tokens = torch.tensor(padded)
        mask = (tokens != PAD).long()
        return {"input_ids": tokens, "attention_mask": mask, "labels": tokens.masked_fill(mask == 0, -100)}

    def _padded(self, row: list[int], length: int) -> list[int]:
        padding = [PAD] * (length - len(row))
        return row + padding if self.side == "right" else padding + row


@pytest.fixture
def files_of() -> Callable[[Path], dict[str, bytes]]:
    """Reads every file below a directory: relative name -> bytes."""

    def read(root: Path) -> dict[str, bytes]:
        return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}

    return read


@dataclass
class Run:
    """A plain training loop that has run: what it trained, and every step as the loop saw it."""

    model: Any
    optimizer: torch.optim.Optimizer
    losses: list[torch.Tensor]
    recorder: Any = None


Watch = Callable[[int, Any, torch.optim.Optimizer], None]


@pytest.fixture
def train() -> Callable[..., Run]:
    """Trains a member of the zoo by a plain loop, recorded into ``ledger`` if one is given."""
    from trainer_attrib.capture.recorder import Recorder

    def run(
        model: Any,
        ledger: Any = None,
        stage: str = "one",
        *,
        steps: int = 6,
        batch: int = 4,
        optimizer: Callable[[Any], torch.optim.Optimizer] = lambda parameters: torch.optim.AdamW(parameters, lr=1e-2),
        accumulate: int = 1,
        clip: float | None = None,
        seed: int = 0,
        named: bool = True,
        watch: Watch | None = None,
        **options: Any,
    ) -> Run:
        model.train()
        torch.manual_seed(seed)
        generator = torch.Generator().manual_seed(seed)
        tuner = optimizer([p for p in model.parameters() if p.requires_grad])
        recorder = Recorder(ledger, stage=stage, model=model, optimizer=tuner, **options) if ledger else None
        done = Run(model, tuner, [], recorder)
        with recorder or nullcontext():
            for step in range(1, steps + 1):
                for micro in range(accumulate):
                    inputs = model.inputs(generator, batch)
                    ids = [f"{step}-{micro}-{row}" for row in range(batch)] if named else None
                    with recorder.batch(ids, denominator=batch) if recorder else nullcontext():
                        loss = model.losses([model(**kwargs) for kwargs in inputs], inputs).mean()
                        loss.backward()
                    done.losses.append(loss.detach())
                if clip:
                    torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
                tuner.step()
                if watch:
                    watch(step, model, tuner)
                tuner.zero_grad()
        return done

    return run
