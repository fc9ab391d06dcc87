"""The callback for the Trainer of ``lightning.pytorch`` and ``pytorch_lightning``, a program's answer for it, and
reports for its loggers."""

from trainer_attrib_integrations.forecast_lightning import forecast as forecast
from trainer_attrib_integrations.lightning import AttributionCallback as AttributionCallback
from trainer_attrib_integrations.log_report import log_report as log_report
from trainer_attrib_integrations.stepping_lightning import Fit as Fit
