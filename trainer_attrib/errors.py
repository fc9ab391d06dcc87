"""Every error this library raises on purpose.

    TrainerAttribError
    ├── ConfigurationError        a setting that cannot work (bad rank, bad stage name, unknown method)
    ├── MissingExtraError         an optional dependency is not installed (also an ImportError)
    ├── LedgerError
    │   ├── LedgerNotFoundError   nothing recorded at this place
    │   ├── LedgerFormatError     written by a newer version, or not a ledger
    │   ├── LedgerNotWritableError
    │   ├── StageExistsError      a stage of that name is already recorded
    │   ├── StageNotFoundError    no stage, snapshot or second-moment version of that name
    │   ├── CorruptPartError      a sealed file has another length or checksum than its manifest says
    │   └── ModelMismatchError    the ledger was recorded from another model
    ├── CaptureError
    │   └── UnsupportedLayerError nothing to capture: no trainable module of a known layer type
    ├── ExecutionError            a task failed in another process
    ├── CancelledError            whoever watched asked a long piece of work to stop
    └── AnalysisError
        ├── BehaviorError         a behavior that cannot be measured
        ├── NotComparableError    a stage trained weights that cannot be expressed in the model's
        ├── MissingDataError      a recipe needs training examples and was not given them
        ├── MissingProgramError   a method needs to run a stage again and was not told how
        └── EvaluationError       scores and a ground truth that cannot be held against each other

Each message says what was found, why, and what to do next.
"""

from __future__ import annotations


class TrainerAttribError(Exception):
    """Base class: ``what`` was found, the likely ``cause``, the ``fix`` to try next."""

    def __init__(self, what: str, *, cause: str = "", fix: str = "") -> None:
        self.what, self.cause, self.fix = what, cause, fix
        lines = [what, f"Likely cause: {cause}" if cause else "", f"Next step: {fix}" if fix else ""]
        super().__init__("\n".join(line for line in lines if line))


class ConfigurationError(TrainerAttribError, ValueError):
    """A setting that cannot work."""


class CancelledError(TrainerAttribError):
    """Whoever watched asked a long piece of work to stop. What was stored until then stays."""


class MissingExtraError(TrainerAttribError, ImportError):
    """An optional dependency is not installed."""

    def __init__(self, module: str, extra: str) -> None:
        self._told = module, extra
        super().__init__(
            f"'{module}' is not installed.",
            cause=f"it belongs to the optional extra '{extra}'.",
            fix=f"pip install 'trainer-attrib[{extra}]'",
        )

    def __reduce__(self) -> tuple[type[MissingExtraError], tuple[str, str]]:
        return MissingExtraError, self._told  # exceptions travel between processes by what made them


class LedgerError(TrainerAttribError):
    """Something about what is on disk."""


class LedgerNotFoundError(LedgerError, FileNotFoundError):
    """Nothing is recorded at this place."""


class LedgerFormatError(LedgerError):
    """The ledger was written by a newer version, or is not a ledger."""


class LedgerNotWritableError(LedgerError, OSError):
    """The ledger's place cannot be written."""


class StageExistsError(LedgerError, FileExistsError):
    """A stage of that name is already recorded."""


class StageNotFoundError(LedgerError, KeyError):
    """No stage, snapshot or second-moment version of that name."""

    __str__ = Exception.__str__  # KeyError would print the message's repr


class CorruptPartError(LedgerError):
    """A sealed file has another length or checksum than its manifest says."""


class ModelMismatchError(LedgerError):
    """The ledger was recorded from another model."""


class CaptureError(TrainerAttribError):
    """Something about capturing a live training run."""


class UnsupportedLayerError(CaptureError):
    """No trainable module of a known layer type was found."""


class ExecutionError(TrainerAttribError):
    """A task failed in another process."""


class AnalysisError(TrainerAttribError):
    """Something about answering from a ledger."""


class BehaviorError(AnalysisError):
    """A behavior that cannot be measured."""


class NotComparableError(AnalysisError):
    """A stage trained weights that cannot be expressed in the model's."""


class MissingDataError(AnalysisError):
    """A recipe needs training examples and was not given them."""


class MissingProgramError(AnalysisError):
    """A method needs to run a stage again and was not told how."""


class EvaluationError(AnalysisError, ValueError):
    """Scores and a ground truth that cannot be held against each other."""
