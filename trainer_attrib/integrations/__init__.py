"""Callbacks for the frameworks: import ``trainer_attrib.integrations.huggingface``. Code: ``integrations/``."""
