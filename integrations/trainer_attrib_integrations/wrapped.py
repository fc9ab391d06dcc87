"""Methods replaced on single objects for the time of a recording, put back as they were."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any


@dataclass(eq=False)
class _Replacement:
    """A method that was put on an object, and what the object had of its own before."""

    owner: Any
    name: str
    method: Any
    before: dict[str, Any]

    def is_below(self, other: _Replacement) -> bool:
        """Whether the other one was put on top of this."""
        return other.owner is self.owner and other.before.get(self.name) is self.method


_LIVE: list[_Replacement] = []  # of all recordings


class Wrapped:
    """Remembers what an object had of its own before: someone else may have replaced the same method."""

    def __init__(self) -> None:
        self._put: list[_Replacement] = []

    def put(self, owner: Any, name: str, method: Any) -> None:
        """Replace a method of one object."""
        own = owner.__dict__
        self._put.append(_Replacement(owner, name, method, {name: own[name]} if name in own else {}))
        _LIVE.append(self._put[-1])
        setattr(owner, name, method)

    def remove(self) -> None:
        """Put everything back, last first; safe to call twice.

        Where two recordings replaced a method, the first to end lies below the other, which shall put back what was
        there before both.
        """
        while self._put:
            gone = self._put.pop()
            _LIVE.remove(gone)
            above = next((other for other in _LIVE if other.name == gone.name and gone.is_below(other)), None)
            if above is not None:
                above.before = gone.before
            else:
                gone.owner.__dict__.pop(gone.name, None)
                gone.owner.__dict__.update(gone.before)


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
