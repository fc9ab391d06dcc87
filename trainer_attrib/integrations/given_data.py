"""Models and examples as the command line is given them."""

from trainer_attrib_integrations.given_data import load_model as load_model
from trainer_attrib_integrations.given_data import read_examples as read_examples
from trainer_attrib_integrations.given_data import read_queries as read_queries
from trainer_attrib_integrations.given_data import read_rows as read_rows
