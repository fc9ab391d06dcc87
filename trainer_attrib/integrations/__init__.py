"""Callbacks for the frameworks: import ``trainer_attrib.integrations.huggingface``. The code is in ``integrations/``."""
