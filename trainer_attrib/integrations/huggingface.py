"""The callback for ``transformers.Trainer`` and every TRL trainer, what drives such a trainer step by step, forecasts
of what it would do, and reports for its trackers."""

from trainer_attrib_integrations.forecast_huggingface import apply_plan as apply_plan
from trainer_attrib_integrations.forecast_huggingface import forecast as forecast
from trainer_attrib_integrations.huggingface import AttributionCallback as AttributionCallback
from trainer_attrib_integrations.log_report import log_report as log_report
from trainer_attrib_integrations.stepping_huggingface import TrainerSteps as TrainerSteps
from trainer_attrib_integrations.stepping_huggingface import steps_of as steps_of
