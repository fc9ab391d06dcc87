"""Thin shells between the frameworks and the recorder. Import them through ``trainer_attrib.integrations``."""
