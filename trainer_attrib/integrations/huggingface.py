"""The callback for ``transformers.Trainer`` and every TRL trainer, and what drives such a trainer step by step."""

from trainer_attrib_integrations.huggingface import AttributionCallback as AttributionCallback
from trainer_attrib_integrations.stepping_huggingface import TrainerSteps as TrainerSteps
from trainer_attrib_integrations.stepping_huggingface import steps_of as steps_of
