"""The callback for ``transformers.Trainer`` and every TRL trainer, what drives such a trainer step by step, forecasts
of what it would do, and reports for its trackers. Whoever records loads the callback alone."""

from typing import TYPE_CHECKING

from trainer_attrib.lazy import on_first_use
from trainer_attrib_integrations.huggingface import AttributionCallback as AttributionCallback

if TYPE_CHECKING:
    from trainer_attrib_integrations.forecast_huggingface import apply_plan as apply_plan
    from trainer_attrib_integrations.forecast_huggingface import forecast as forecast
    from trainer_attrib_integrations.log_report import log_report as log_report
    from trainer_attrib_integrations.stepping_huggingface import TrainerSteps as TrainerSteps
    from trainer_attrib_integrations.stepping_huggingface import steps_of as steps_of

_HOMES = {
    "TrainerSteps": "trainer_attrib_integrations.stepping_huggingface",
    "apply_plan": "trainer_attrib_integrations.forecast_huggingface",
    "forecast": "trainer_attrib_integrations.forecast_huggingface",
    "log_report": "trainer_attrib_integrations.log_report",
    "steps_of": "trainer_attrib_integrations.stepping_huggingface",
}
__getattr__ = on_first_use(__name__, _HOMES)
__all__ = ["AttributionCallback", "TrainerSteps", "apply_plan", "forecast", "log_report", "steps_of"]


def __dir__() -> list[str]:
    return __all__
