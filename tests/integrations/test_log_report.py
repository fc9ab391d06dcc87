"""A report on its way to a tracker. Fakes have the signatures of wandb 0.31, mlflow 3.17 and trackio 0.43."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from transformers import TrainerCallback

from trainer_attrib.analysis.results import Effect, StageEffects
from trainer_attrib.errors import ConfigurationError
from trainer_attrib.integrations import huggingface, lightning
from trainer_attrib.integrations.huggingface import log_report

HOSTILE = "<script>alert(1)</script>"
RESULT = StageEffects((Effect("polite", HOSTILE, "sft", "change", "mean", 1.0, 0.1, True, 0.0),))


class Run:
    """W&B's and Trackio's: keeps what the file held when it was handed over."""

    def __init__(self) -> None:
        self.taken: list[tuple[str, str, str | None, str | None]] = []

    def log_artifact(
        self, artifact_or_path: str, name: str | None = None, type: str | None = None, aliases: list[str] | None = None
    ) -> None:
        self.taken.append((Path(artifact_or_path).name, Path(artifact_or_path).read_text(), name, type))


class Client:
    """MLflow's."""

    def __init__(self) -> None:
        self.taken: list[tuple[str, str, str]] = []

    def log_artifact(self, run_id: str, local_path: str, artifact_path: str | None = None) -> None:
        self.taken.append((run_id, Path(local_path).name, Path(local_path).read_text()))


class SummaryWriter:
    """TensorBoard's."""

    made: list[SummaryWriter] = []  # noqa: RUF012

    def __init__(self, log_dir: str | None = None) -> None:
        self.log_dir, self.texts, self.closed = log_dir, [], False
        self.made.append(self)

    def add_text(self, tag: str, text_string: str, global_step: int | None = None) -> None:
        assert not self.closed
        self.texts.append((tag, text_string))

    def flush(self) -> None: ...

    def close(self) -> None:
        self.closed = True


def reporter(name: str, **own: Any) -> TrainerCallback:
    """A callback with the class name of one of transformers' reporters."""
    made = type(name, (TrainerCallback,), {})()
    vars(made).update(own)
    return made


def trainer_with(*callbacks: Any, leads: bool = True) -> Any:
    return SimpleNamespace(
        callback_handler=SimpleNamespace(callbacks=[TrainerCallback(), *callbacks]), is_world_process_zero=lambda: leads
    )


def module(monkeypatch: pytest.MonkeyPatch, name: str, **functions: Any) -> ModuleType:
    made = ModuleType(name)
    vars(made).update(functions)
    monkeypatch.setitem(sys.modules, name, made)
    return made


def test_both_integrations_have_it() -> None:
    assert huggingface.log_report is lightning.log_report


def test_wandb_takes_an_artifact(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run()
    module(monkeypatch, "wandb", run=run)
    places = log_report(trainer_with(reporter("WandbCallback")), RESULT, name="effects")
    [(file, page, name, kind)] = run.taken
    assert (file, name, kind) == ("effects.html", "effects", "report")
    assert page.startswith("<!doctype html>")
    assert "polite" in page
    assert HOSTILE not in page
    assert len(places) == 1
    assert "artifact effects" in places[0]
    log_report(run, RESULT, name="again")
    logger = type("WandbLogger", (), {"experiment": run})()
    log_report(SimpleNamespace(loggers=[logger], is_global_zero=True), RESULT, name="third")
    assert [name for _, _, name, _ in run.taken] == ["effects", "again", "third"]


def test_mlflow_takes_it_after_the_trainer_ended_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    client, last = Client(), SimpleNamespace(info=SimpleNamespace(run_id="r1"))

    def log_artifact(local_path: str, artifact_path: str | None = None, run_id: str | None = None) -> None:
        assert run_id is not None
        client.log_artifact(run_id, local_path, artifact_path)

    mlflow = module(
        monkeypatch, "mlflow", active_run=lambda: None, last_active_run=lambda: last, log_artifact=log_artifact
    )
    log_report(trainer_with(reporter("MLflowCallback")), RESULT)
    log_report(mlflow, RESULT)
    logger = type("MLFlowLogger", (), {"experiment": client, "run_id": "r2"})()
    log_report(logger, RESULT)
    assert [(run, file) for run, file, _ in client.taken] == [
        (run, "trainer-attrib-report.html") for run in ("r1", "r1", "r2")
    ]


def test_trackio_takes_an_artifact_of_the_run_or_a_file_of_the_project(monkeypatch: pytest.MonkeyPatch) -> None:
    run, saved = Run(), []

    def save(glob_str: str, project: str | None = None) -> str:
        saved.append((Path(glob_str).name, project))
        return "files/of/project"

    held: dict[str, Any] = {"run": run, "project": "p"}
    variables = SimpleNamespace(
        current_run=SimpleNamespace(get=lambda: held["run"]),
        current_project=SimpleNamespace(get=lambda: held["project"]),
    )
    trackio = module(monkeypatch, "trackio", context_vars=variables, log_artifact=run.log_artifact, save=save)
    target = trainer_with(reporter("TrackioCallback"))
    log_report(target, RESULT, name="effects")
    held["run"] = None  # the trainer's callback finished it
    assert log_report(target, RESULT, name="effects") == ["trackio: file files/of/project"]
    assert [name for _, _, name, _ in run.taken] == ["effects"]
    assert saved == [("effects.html", "p")]
    held["project"] = None
    with pytest.raises(ConfigurationError, match="no run and no project"):
        log_report(trackio, RESULT)


def test_tensorboard_takes_a_summary_before_and_after_its_writer_is_closed() -> None:
    writer = SummaryWriter("during")
    callback = reporter("TensorBoardCallback", tb_writer=writer, logging_dir="logs", _SummaryWriter=SummaryWriter)
    log_report(trainer_with(callback), RESULT, name="effects")
    [(tag, text)] = writer.texts
    assert tag == "effects"
    assert "polite" in text
    assert all(line.startswith("    ") for line in text.splitlines())  # code, in which Markdown takes no markup
    callback.tb_writer = None
    log_report(trainer_with(callback), RESULT)
    another = SummaryWriter.made[-1]
    assert another is not writer
    assert (another.log_dir, another.closed, len(another.texts)) == ("logs", True, 1)
    log_report(type("TensorBoardLogger", (), {"experiment": writer})(), RESULT)
    log_report(writer, RESULT)
    assert len(writer.texts) == 3
    with pytest.raises(ConfigurationError, match="not known before training begins"):
        log_report(trainer_with(reporter("TensorBoardCallback", tb_writer=None, logging_dir=None)), RESULT)


@pytest.mark.parametrize("package", ["lightning.pytorch", "pytorch_lightning"])
def test_the_csv_logger_has_it_beside_its_logs(package: str, tmp_path: Path) -> None:
    logger = importlib.import_module(f"{package}.loggers").CSVLogger(str(tmp_path))
    trainer = importlib.import_module(package).Trainer(
        logger=logger, accelerator="cpu", enable_checkpointing=False, enable_progress_bar=False, barebones=False
    )
    [place] = log_report(trainer, RESULT, name="effects")
    file = Path(logger.log_dir, "effects.html")
    assert place == f"csv: {file}"
    assert "polite" in file.read_text()


def test_a_file_that_was_written_before_is_taken_too(tmp_path: Path) -> None:
    run = Run()
    written = RESULT.report(tmp_path / "page.html")
    log_report(run, written, name="effects")
    log_report(run, str(written), name="effects")
    assert [(file, text) for file, text, _, _ in run.taken] == 2 * [("effects.html", written.read_text())]
    with pytest.raises(ConfigurationError, match="no file"):
        log_report(run, tmp_path / "missing.html")
    assert len(run.taken) == 2


def test_all_trackers_of_a_trainer_are_asked_and_one_that_takes_it_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    module(monkeypatch, "wandb", run=None)
    writer = SummaryWriter()
    callback = reporter("TensorBoardCallback", tb_writer=writer, logging_dir=None)
    assert log_report(trainer_with(reporter("WandbCallback"), callback), RESULT) == [
        "tensorboard: text trainer-attrib-report"
    ]


def test_it_says_why_where_nothing_can_take_it(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigurationError, match="reports to none"):
        log_report(trainer_with(), RESULT)
    module(monkeypatch, "wandb", run=None)
    with pytest.raises(ConfigurationError, match=r"W&B has no active run"):
        log_report(trainer_with(reporter("WandbCallback")), RESULT)
    with pytest.raises(ConfigurationError, match="CometLogger is not known to take files"):
        log_report(type("CometLogger", (), {})(), RESULT)
    monkeypatch.delitem(sys.modules, "mlflow", raising=False)
    with pytest.raises(ConfigurationError, match="mlflow is not imported"):
        log_report(trainer_with(reporter("MLflowCallback")), RESULT)
    with pytest.raises(ConfigurationError, match="cannot name an artifact"):
        log_report(Run(), RESULT, name="../effects")


def test_only_the_first_process_logs(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run()
    module(monkeypatch, "wandb", run=run)
    assert log_report(trainer_with(reporter("WandbCallback"), leads=False), RESULT) == []
    logger = type("WandbLogger", (), {"experiment": run})()
    assert log_report(SimpleNamespace(loggers=[logger], is_global_zero=False), RESULT) == []
    assert run.taken == []
