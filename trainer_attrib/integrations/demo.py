"""The demo: three recorded stages of a small language model, accounted for and checked by retraining."""

from trainer_attrib_integrations.demo.run import run_demo as run_demo
