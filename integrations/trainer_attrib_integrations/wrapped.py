"""Methods replaced on single objects for the time of a recording, put back as they were."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Wrapped:
    """Remembers what an object had of its own before: someone else may have replaced the same method."""

    def __init__(self) -> None:
        self._before: list[tuple[Any, str, dict[str, Any]]] = []

    def put(self, owner: Any, name: str, method: Any) -> None:
        """Replace a method of one object."""
        own = owner.__dict__
        self._before.append((owner, name, {name: own[name]} if name in own else {}))
        setattr(owner, name, method)

    def remove(self) -> None:
        """Put everything back, last first; safe to call twice."""
        while self._before:
            owner, name, own = self._before.pop()
            owner.__dict__.pop(name, None)
            owner.__dict__.update(own)


@contextmanager
def replaced(owner: Any, **methods: Any) -> Iterator[None]:
    """Methods of one object replaced for the time of a block."""
    wrapped = Wrapped()
    try:
        for name, method in methods.items():
            wrapped.put(owner, name, method)
        yield
    finally:
        wrapped.remove()
