"""The world of the forecast benchmark: a small language model with styles, preference data, real DPO runs."""
