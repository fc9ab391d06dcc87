"""Where work runs. Knows nothing of what the work is."""
