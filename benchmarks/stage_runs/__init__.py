"""Real multi-stage trainings with known answers, for ``stage_effects.py``: pipelines, truths, scores, targets."""
