"""The callback for ``transformers.Trainer`` and every TRL trainer."""

from trainer_attrib_integrations.huggingface import AttributionCallback as AttributionCallback
