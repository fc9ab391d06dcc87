"""The callback for the Trainer of ``lightning.pytorch`` and ``pytorch_lightning``."""

from trainer_attrib_integrations.lightning import AttributionCallback as AttributionCallback
