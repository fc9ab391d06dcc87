"""Forecasts: what a training run would do to behaviors, before it is run."""
