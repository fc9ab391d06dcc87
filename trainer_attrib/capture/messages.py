"""What the recorder tells the person who trains: through ``logging``, visible by default, like the trainers' own."""

from __future__ import annotations

import logging

logger = logging.getLogger("trainer_attrib")


def show_messages() -> None:
    """Show this library's messages on stderr unless the application configured logging itself."""
    if not logger.handlers and not logging.getLogger().handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("[trainer-attrib] %(message)s"))
        logger.addHandler(handler)
        logger.propagate = False
    if logger.level == logging.NOTSET:
        logger.setLevel(logging.INFO)
