"""Record what training did while it happens; afterwards, ask which stage and which examples made the model so.

Names are imported on first use: importing this package loads neither torch nor any framework.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from trainer_attrib.lazy import on_first_use
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

_HOMES = {
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

__getattr__ = on_first_use(__name__, _HOMES)

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


def __dir__() -> list[str]:
    return __all__
