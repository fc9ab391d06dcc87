"""The callback for the Trainer of ``lightning.pytorch`` and ``pytorch_lightning``, a program's answer for it, and
reports for its loggers. Whoever records loads the callback alone."""

from typing import TYPE_CHECKING

from trainer_attrib.lazy import on_first_use
from trainer_attrib_integrations.lightning import AttributionCallback as AttributionCallback

if TYPE_CHECKING:
    from trainer_attrib_integrations.forecast_lightning import forecast as forecast
    from trainer_attrib_integrations.log_report import log_report as log_report
    from trainer_attrib_integrations.stepping_lightning import Fit as Fit

_HOMES = {
    "Fit": "trainer_attrib_integrations.stepping_lightning",
    "forecast": "trainer_attrib_integrations.forecast_lightning",
    "log_report": "trainer_attrib_integrations.log_report",
}
__getattr__ = on_first_use(__name__, _HOMES)
__all__ = ["AttributionCallback", "Fit", "forecast", "log_report"]


def __dir__() -> list[str]:
    return __all__
