"""Data, models and rankings of the hallucination benchmark."""
