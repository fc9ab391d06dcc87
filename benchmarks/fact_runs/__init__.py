"""Data, model and rankings of the fact tracing benchmark."""
