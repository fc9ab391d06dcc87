"""One call gives a report to the tracker of a training: as an artifact where the tracker has them.

No tracker is imported: the trainer's callbacks and loggers hold theirs, and what they name is found in ``sys.modules``.
They are told apart by the names of their classes, so that Lightning's loggers of both packages are the same.
"""

from __future__ import annotations

import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from trainer_attrib.analysis.results import Result
from trainer_attrib.errors import ConfigurationError


@dataclass(frozen=True)
class _Report:
    """A file to hand on, what it is called, and what it says in a few lines."""

    file: Path
    name: str
    summary: str


class _CannotTakeError(Exception):
    """This tracker has no place for a report, or none now; says why."""


def log_report(target: Any, report: Any, *, name: str = "trainer-attrib-report") -> list[str]:
    """Give a report to a training's tracker.

    Args:
        target: a ``transformers`` or Lightning trainer, whose reporters or loggers are asked, all of them; or one of
            Lightning's loggers, a run of W&B or Trackio, a ``SummaryWriter``, the module ``mlflow`` or ``trackio``.
        report: a result of the analyzer, which is written as one HTML file, or the path of a file.
        name: of the artifact or text: letters, digits, dots, dashes and underscores.

    Returns:
        Where it went, a line for each. In processes other than the first of several nothing is done, and it is empty.

    Raises:
        ConfigurationError: nothing there can take a report; says why for each that was asked. Or there is no such file,
            or the name cannot be one. What a tracker itself raises is not caught.
    """
    if not re.fullmatch(r"[A-Za-z0-9_.-]+", name):
        raise ConfigurationError(
            f"name={name!r} cannot name an artifact.", fix="use letters, digits, '.', '_' and '-'."
        )
    if not _leads(target):
        return []
    taken, refused = [], []
    with tempfile.TemporaryDirectory() as folder:
        written = _written(report, Path(folder), name)
        for receiver in _receivers(target):
            try:
                taken.append(_give(receiver, written))
            except _CannotTakeError as why:
                refused.append(str(why))
    if not taken:
        raise ConfigurationError(
            f"No tracker of this {type(target).__name__} can take a report.",
            cause="; ".join(refused) or "it reports to none (report_to, logger).",
            fix="pass a W&B run, a SummaryWriter, the module mlflow or trackio or a logger of Lightning instead, or "
            "write the file yourself: result.report(path).",
        )
    return taken


def _leads(target: Any) -> bool:
    if callable(is_first := getattr(target, "is_world_process_zero", None)):
        return bool(is_first())
    return bool(getattr(target, "is_global_zero", True))


def _written(report: Any, folder: Path, name: str) -> _Report:
    if isinstance(report, Result):
        return _Report(report.report(folder / f"{name}.html"), name, repr(report))
    path = Path(report)
    if not path.is_file():
        raise ConfigurationError(f"There is no file {path}.", fix="pass a result, or the path that report() returned.")
    return _Report(Path(shutil.copy(path, folder / f"{name}{path.suffix}")), name, f"The report is {path.resolve()}")


def _receivers(target: Any) -> Iterable[Any]:
    handler = getattr(target, "callback_handler", None)  # transformers
    if handler is not None:
        return [callback for callback in handler.callbacks if _taker(callback) is not None]
    loggers = getattr(target, "loggers", None)  # Lightning
    return [target] if loggers is None else loggers


def _give(receiver: Any, report: _Report) -> str:
    take = _taker(receiver)
    if take is None:
        raise _CannotTakeError(f"{_called(receiver)} is not known to take files")
    return take(receiver, report)


def _taker(receiver: Any) -> Callable[[Any, _Report], str] | None:
    if isinstance(receiver, ModuleType):
        return _TAKERS.get(receiver.__name__)
    return next((_TAKERS[kind.__name__] for kind in type(receiver).__mro__ if kind.__name__ in _TAKERS), None)


def _called(receiver: Any) -> str:
    return receiver.__name__ if isinstance(receiver, ModuleType) else type(receiver).__name__


def _loaded(module: str) -> Any:
    if module not in sys.modules:
        raise _CannotTakeError(f"{module} is not imported")
    return sys.modules[module]


# ---- what each tracker has for it ------------------------------------------------------------------------------------


def _to_run(run: Any, report: _Report) -> str:
    """Of W&B, or of Trackio, which has the same call."""
    if not callable(getattr(run, "log_artifact", None)):
        raise _CannotTakeError(f"a {type(run).__module__}.Run has no log_artifact")
    run.log_artifact(str(report.file), name=report.name, type="report")
    return f"{type(run).__module__.partition('.')[0]}: artifact {report.name}"


def _to_current_wandb_run(callback: Any, report: _Report) -> str:
    run = _loaded("wandb").run
    if run is None:
        raise _CannotTakeError("W&B has no active run")
    return _to_run(run, report)


def _to_wandb_logger(logger: Any, report: _Report) -> str:
    return _to_run(logger.experiment, report)


def _to_mlflow(callback: Any, report: _Report) -> str:
    """The trainer's callback ends the run when training ends: the last run is meant then."""
    mlflow = _loaded("mlflow")
    run = mlflow.active_run() or mlflow.last_active_run()
    if run is None:
        raise _CannotTakeError("MLflow has no run")
    mlflow.log_artifact(str(report.file), run_id=run.info.run_id)
    return f"mlflow: {report.file.name} of run {run.info.run_id}"


def _to_mlflow_logger(logger: Any, report: _Report) -> str:
    client = logger.experiment  # first, since it may begin the run
    client.log_artifact(logger.run_id, str(report.file))
    return f"mlflow: {report.file.name} of run {logger.run_id}"


def _to_trackio(callback: Any, report: _Report) -> str:
    """The trainer's callback finishes the run when training ends: only the project can take a file then."""
    trackio = _loaded("trackio")
    if trackio.context_vars.current_run.get() is not None:
        trackio.log_artifact(str(report.file), name=report.name, type="report")
        return f"trackio: artifact {report.name}"
    project = trackio.context_vars.current_project.get()
    if project is None:
        raise _CannotTakeError("Trackio has no run and no project; call trackio.init(project=...)")
    return f"trackio: file {trackio.save(str(report.file), project=project)}"


def _to_summary_writer(writer: Any, report: _Report) -> str:
    writer.add_text(report.name, "\n".join("    " + line for line in report.summary.splitlines()))  # code, in Markdown
    writer.flush()
    return f"tensorboard: text {report.name}"


def _to_tensorboard_callback(callback: Any, report: _Report) -> str:
    """The callback closes its writer when training ends: another one writes a file beside the first."""
    if callback.tb_writer is not None:
        return _to_summary_writer(callback.tb_writer, report)
    if callback.logging_dir is None:
        raise _CannotTakeError("TensorBoard's directory is not known before training begins")
    writer = callback._SummaryWriter(log_dir=callback.logging_dir)
    try:
        return _to_summary_writer(writer, report)
    finally:
        writer.close()


def _to_tensorboard_logger(logger: Any, report: _Report) -> str:
    return _to_summary_writer(logger.experiment, report)


def _to_csv_logger(logger: Any, report: _Report) -> str:
    Path(logger.log_dir).mkdir(parents=True, exist_ok=True)
    return f"csv: {shutil.copy(report.file, logger.log_dir)}"


_TAKERS: dict[str, Callable[[Any, _Report], str]] = {
    "WandbCallback": _to_current_wandb_run,
    "WandbLogger": _to_wandb_logger,
    "Run": _to_run,
    "MLflowCallback": _to_mlflow,
    "mlflow": _to_mlflow,
    "MLFlowLogger": _to_mlflow_logger,
    "TrackioCallback": _to_trackio,
    "trackio": _to_trackio,
    "TensorBoardCallback": _to_tensorboard_callback,
    "TensorBoardLogger": _to_tensorboard_logger,
    "SummaryWriter": _to_summary_writer,
    "CSVLogger": _to_csv_logger,
}
