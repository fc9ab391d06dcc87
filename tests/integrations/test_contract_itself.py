"""The contract suite finds what it is there to find: integrations with one fault each fail the test of that fault."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("lightning.pytorch")
pytest.importorskip("accelerate")

from tests.integrations import test_contract as contract
from trainer_attrib.capture.recorder import Recorder
from trainer_attrib.testing.contract import CASES, IntegrationContract
from trainer_attrib.testing.run import Run, Trained

PAGE = Path(__file__).parents[2] / "docs" / "extending.md"
Suite = IntegrationContract


def rows(suite: Suite, folder: Path) -> None:
    suite.test_rows_are_the_examples_own_gradients("clipping", torch.float32, folder)


def bits(suite: Suite, folder: Path) -> None:
    suite.test_training_is_bit_identical(next(iter(CASES)), folder)


def breaks(suite: Suite, folder: Path) -> None:
    suite.test_a_run_that_breaks_off_is_closed(RuntimeError, folder)


class Faulty(contract.TestPlainLoop):
    """A sound loop, but for what it does after recorded training."""

    def __init__(self, afterwards: Callable[[Run, Trained], object]) -> None:
        self.afterwards = afterwards

    def train(self, run: Run) -> Trained:
        trained = super().train(run)
        if run.ledger is not None:
            self.afterwards(run, trained)
        return trained


class Swallowing(contract.TestPlainLoop):
    """A loop that keeps its errors to itself."""

    def train(self, run: Run) -> Trained:
        with suppress(RuntimeError):
            return super().train(run)
        return Trained(run.made[0], [])


def nudge(run: Run, trained: Trained) -> None:
    with torch.no_grad():
        next(trained.model.parameters()).view(-1)[0] += 1e-6


AFTERWARDS: dict[str, Callable[[Run, Trained], object]] = {
    "a weight is nudged": nudge,
    "a random number is drawn": lambda run, trained: torch.rand(1),
    "a hook is left": lambda run, trained: trained.model.head.register_forward_hook(lambda *args: None),
    "a loss is changed": lambda run, trained: trained.losses.append(0.0),
}


@pytest.mark.parametrize("fault", AFTERWARDS)
def test_changed_training_is_found(fault: str, tmp_path: Path) -> None:
    with pytest.raises(AssertionError):
        bits(Faulty(AFTERWARDS[fault]), tmp_path)


def test_swallowed_errors_are_found(tmp_path: Path) -> None:
    with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"):
        breaks(Swallowing(), tmp_path)


def _reversed_ids(original: Callable[..., Any]) -> Callable[..., Any]:
    return lambda self, ids, **known: original(self, ids[::-1], **known)


RECORDER: dict[str, tuple[str, Callable[[Any], Any], Callable[[Suite, Path], None]]] = {
    "losses are not told": ("note_loss", lambda original: lambda self, loss: None, rows),
    "losses are told twice": ("note_loss", lambda original: lambda self, loss: original(self, 2 * loss), rows),
    "ids are mixed up": ("batch", _reversed_ids, rows),
    "a broken stage stays open": ("interrupt", lambda original: lambda self, reason: None, breaks),
    "a broken stage counts as complete": ("interrupt", lambda original: lambda self, reason: self.finish(), breaks),
}


@pytest.mark.parametrize("fault", RECORDER)
def test_a_recorder_used_wrongly_is_found(fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name, wrong, test = RECORDER[fault]
    monkeypatch.setattr(Recorder, name, wrong(getattr(Recorder, name)))
    with pytest.raises(AssertionError):
        test(contract.TestPlainLoop(), tmp_path)


def test_a_new_order_of_events_is_found(tmp_path: Path) -> None:
    """The message names both versions and the first difference."""

    class Upgraded(IntegrationContract):
        unsupported: Any = {}  # noqa: RUF012
        event_order: Any = {"framework 1": ["begin", "step", "end"]}  # noqa: RUF012

        def events(self, run: Run) -> tuple[str, list[str]]:
            return "framework 2.0", ["begin", "end", "step"]

    with pytest.raises(AssertionError, match=r"^framework 2.0 .* framework 1. Event 1 is \['end'\], pinned is"):
        Upgraded().test_events_come_in_the_order_relied_on(tmp_path)


def test_the_integration_of_the_documentation_keeps_the_contract(tmp_path: Path) -> None:
    block = next(b for b in PAGE.read_text().split("```python\n")[1:] if "class TestMyTrainer" in b).split("```")[0]
    names: dict[str, Any] = {"__name__": "documented"}
    exec(compile(block, str(PAGE), "exec"), names)
    suite = names["TestMyTrainer"]()
    for test in (rows, bits, breaks):
        (tmp_path / test.__name__).mkdir()
        test(suite, tmp_path / test.__name__)
    suite.test_rows_are_the_examples_own_gradients("max_steps in mid-epoch", torch.float64, tmp_path / "whole")
