"""An error of a model on the command line."""

from trainer_attrib_integrations.tracing_errors import TracedError as TracedError
