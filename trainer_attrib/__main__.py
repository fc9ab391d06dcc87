"""``python -m trainer_attrib`` is the command line."""

import sys

from trainer_attrib.cli import main

sys.exit(main())
