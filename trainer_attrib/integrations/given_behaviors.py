"""Behaviors as the command line is given them."""

from trainer_attrib_integrations.given_behaviors import given_behaviors as given_behaviors
from trainer_attrib_integrations.given_behaviors import read_prompts as read_prompts
from trainer_attrib_integrations.given_behaviors import read_text_queries as read_text_queries
