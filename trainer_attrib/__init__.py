"""Record what training did while it happens; afterwards, ask which stage and which examples made the model so.

Names are imported on first use: importing this package loads neither torch nor any framework.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from trainer_attrib.version import __version__ as __version__

if TYPE_CHECKING:
    from trainer_attrib.analysis.analyzer import Analyzer as Analyzer
    from trainer_attrib.analysis.behavior import Behavior as Behavior
    from trainer_attrib.analysis.examples import Examples as Examples
    from trainer_attrib.analysis.influence_results import Influence as Influence
    from trainer_attrib.analysis.keeping import keep as keep
    from trainer_attrib.analysis.rates import Generations as Generations
    from trainer_attrib.analysis.results import StageEffects as StageEffects
    from trainer_attrib.capture.recorder import Recorder as Recorder
    from trainer_attrib.errors import TrainerAttribError as TrainerAttribError
    from trainer_attrib.explorer.serving import explore as explore
    from trainer_attrib.ledger.reader import Ledger as Ledger
    from trainer_attrib.types import Shadow as Shadow
    from trainer_attrib.types import SketchConfig as SketchConfig

_HOME = {
    "Analyzer": "trainer_attrib.analysis.analyzer",
    "Behavior": "trainer_attrib.analysis.behavior",
    "Examples": "trainer_attrib.analysis.examples",
    "Generations": "trainer_attrib.analysis.rates",
    "Influence": "trainer_attrib.analysis.influence_results",
    "Ledger": "trainer_attrib.ledger.reader",
    "Recorder": "trainer_attrib.capture.recorder",
    "Shadow": "trainer_attrib.types",
    "SketchConfig": "trainer_attrib.types",
    "StageEffects": "trainer_attrib.analysis.results",
    "TrainerAttribError": "trainer_attrib.errors",
    "explore": "trainer_attrib.explorer.serving",
    "keep": "trainer_attrib.analysis.keeping",
}

__all__ = [
    "Analyzer",
    "Behavior",
    "Examples",
    "Generations",
    "Influence",
    "Ledger",
    "Recorder",
    "Shadow",
    "SketchConfig",
    "StageEffects",
    "TrainerAttribError",
    "__version__",
    "explore",
    "keep",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'trainer_attrib' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return __all__
