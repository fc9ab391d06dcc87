"""Names that a module imports when they are first asked for, so that importing it costs only what is used."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any


def on_first_use(module: str, homes: Mapping[str, str]) -> Callable[[str], Any]:
    """The ``__getattr__`` of a module (PEP 562).

    Args:
        module: its name.
        homes: name -> the module that has it.
    """

    def found(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module '{module}' has no attribute '{name}'")
        return getattr(importlib.import_module(homes[name]), name)

    return found
