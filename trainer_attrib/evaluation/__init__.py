"""How good is an attribution? Truth by retraining, what is measured against it, controls and baselines beside it."""
