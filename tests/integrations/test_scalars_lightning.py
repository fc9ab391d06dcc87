"""Scalars of the recording in Lightning's loggers: beside what the module logs, and nowhere that training looks."""

from __future__ import annotations

import csv
import importlib
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.integrations.test_lightning import BATCH, PACKAGES, ROWS, callback, data, modules, stage_of, trainer_of

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers.*:UserWarning", "ignore:.*log_every_n_steps.*:UserWarning"
)
NAMES = {f"trainer_attrib/{name}" for name in ("rows", "bytes", "overhead", "loss_of_covered", "coverage")}
both_packages = pytest.mark.parametrize("package", PACKAGES)


def caught(package: str, attribution: Any) -> Any:
    """Lets the writer's thread catch up at the end of each batch, so that numbers can be compared."""

    class Caught(importlib.import_module(package).Callback):
        def on_train_batch_end(self, *args: Any) -> None:
            attribution._recorder.checkpoint()

    return Caught()


def csv_logger(package: str, tmp_path: Path, name: str = "logs", **settings: Any) -> Any:
    return importlib.import_module(f"{package}.loggers").CSVLogger(str(tmp_path), name=name, **settings)


def fit(package: str, tmp_path: Path, callbacks: list[Any], manual: int = 0, **settings: Any) -> Any:
    torch.manual_seed(3)
    module = modules(package)(manual=manual)
    trainer = trainer_of(package, tmp_path, callbacks, **settings)
    trainer.fit(module, data(), data())
    return trainer


def written(trainer: Any) -> list[dict[str, str]]:
    """Rows of the file, without the columns that are empty there."""
    with open(Path(trainer.logger.log_dir, "metrics.csv"), newline="") as file:
        return [{name: value for name, value in row.items() if value != ""} for row in csv.DictReader(file)]


def ours(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    return [row for row in rows if any(name.startswith("trainer_attrib/") for name in row)]


@both_packages
def test_a_csv_file_has_them_beside_the_loss(package: str, tmp_path: Path) -> None:
    attribution = callback(tmp_path)
    trainer = fit(
        package, tmp_path, [caught(package, attribution), attribution],
        logger=csv_logger(package, tmp_path), log_every_n_steps=2,
    )  # fmt: skip
    rows = written(trainer)
    found = ours(rows)
    losses = {row["step"]: row["loss"] for row in rows if "loss" in row}
    assert [row["step"] for row in found] == ["1", "3", "5"] == list(losses)
    assert set(found[0]) == NAMES | {"step"}
    assert [float(row["trainer_attrib/rows"]) for row in found] == [2 * BATCH, 4 * BATCH, 6 * BATCH]
    assert float(found[0]["trainer_attrib/coverage"]) == stage_of(tmp_path).meta["coverage"]["share"]
    recorded = stage_of(tmp_path).steps()["loss"].to_pylist()
    means = [sum(recorded[k : k + 2]) / 2 for k in (0, 2, 4)]
    assert [float(row["trainer_attrib/loss_of_covered"]) for row in found] == pytest.approx(means)


@pytest.mark.parametrize("settings", [{"accumulate_grad_batches": 3}, {"manual": 2}], ids=["accumulated", "manual"])
def test_they_are_logged_once_per_step_that_is_logged(settings: dict[str, int], tmp_path: Path) -> None:
    package = "lightning.pytorch"
    attribution = callback(tmp_path)
    trainer = fit(
        package, tmp_path, [caught(package, attribution), attribution], logger=csv_logger(package, tmp_path), **settings
    )
    rows = written(trainer)
    expected = ["0", "1"] if "manual" not in settings else ["0", "1", "2", "3", "4", "5"]
    assert [row["step"] for row in ours(rows)] == expected
    assert [row["step"] for row in rows if "loss" in row] == expected
    visits = 2 * ROWS * settings.get("manual", 1)
    assert float(ours(rows)[-1]["trainer_attrib/rows"]) == visits


@both_packages
def test_training_looks_at_none_of_them(package: str, tmp_path: Path) -> None:
    """Same metrics for checkpoints and early stopping, same log otherwise, same weights, same random state."""
    outcomes = []
    for name, callbacks in (("plain", []), ("recorded", [callback(tmp_path)])):
        trainer = fit(
            package, tmp_path, callbacks, logger=csv_logger(package, tmp_path, name), enable_checkpointing=True
        )
        saved = torch.load(trainer.checkpoint_callback.best_model_path, weights_only=False)
        assert "trainer_attrib/" not in str(saved["loops"])
        outcomes.append(
            {
                "callback_metrics": trainer.callback_metrics,
                "logged_metrics": trainer.logged_metrics,
                "bar": {name: value for name, value in trainer.progress_bar_metrics.items() if name != "v_num"},
                "rows": [row for row in written(trainer) if row not in ours(written(trainer))],
                "weights": trainer.lightning_module.state_dict(),
                "random": torch.get_rng_state(),
            }
        )
    plain, recorded = outcomes
    assert len(plain["rows"]) == 8
    assert set(plain["callback_metrics"]) == {"loss", "val"}
    for part in ("callback_metrics", "logged_metrics", "bar", "rows"):
        assert plain[part] == recorded[part], part
    assert all(torch.equal(weight, recorded["weights"][name]) for name, weight in plain["weights"].items())
    assert torch.equal(plain["random"], recorded["random"])


def test_a_logger_that_fails_ends_neither_training_nor_recording(tmp_path: Path, caplog: Any) -> None:
    logger = csv_logger("lightning.pytorch", tmp_path)
    original = logger.log_metrics

    def full(metrics: dict[str, Any], step: int | None = None) -> None:
        if any(name.startswith("trainer_attrib/") for name in metrics):
            raise OSError(28, "No space left on device")
        original(metrics, step)

    logger.log_metrics = full
    trainer = fit("lightning.pytorch", tmp_path, [callback(tmp_path)], logger=logger)
    assert trainer.global_step == 6
    assert caplog.text.count("nothing more about the recording goes to the tracker: OSError") == 1
    assert len([row for row in written(trainer) if "loss" in row]) == 6
    assert (stage_of(tmp_path).meta["status"], stage_of(tmp_path).count("rows")) == ("complete", 2 * ROWS)


def test_every_logger_gets_them_and_none_where_the_trainer_never_logs(tmp_path: Path) -> None:
    package = "lightning.pytorch"
    loggers = [csv_logger(package, tmp_path, "a"), csv_logger(package, tmp_path, "b", prefix="run")]
    attribution = callback(tmp_path)
    fit(package, tmp_path, [caught(package, attribution), attribution], logger=loggers)
    texts = [Path(logger.log_dir, "metrics.csv").read_text() for logger in loggers]
    assert "run-trainer_attrib/rows" in texts[1]
    assert all(text.count("trainer_attrib/rows") == 1 for text in texts)  # in the header
    silent = csv_logger(package, tmp_path, "c")
    again = callback(tmp_path / "again")
    fit(package, tmp_path, [again], logger=silent, log_every_n_steps=0)
    assert "trainer_attrib/" not in Path(silent.log_dir, "metrics.csv").read_text()
