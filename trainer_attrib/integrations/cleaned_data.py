"""A cleaned or planned data set on disk."""

from trainer_attrib_integrations.cleaned_data import refuse_existing as refuse_existing
from trainer_attrib_integrations.cleaned_data import write_cleaned as write_cleaned
from trainer_attrib_integrations.cleaned_data import write_rows as write_rows
