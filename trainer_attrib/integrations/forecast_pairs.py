"""A forecast on the command line."""

from trainer_attrib_integrations.forecast_pairs import PairsForecast as PairsForecast
from trainer_attrib_integrations.forecast_pairs import preference_trainer as preference_trainer
from trainer_attrib_integrations.forecast_pairs import read_pairs as read_pairs
