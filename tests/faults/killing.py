"""Runs a piece of work in a forked process and kills it, at a random time or at a random file operation."""

from __future__ import annotations

import importlib
import json
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_OPERATIONS = ((os, "fsync"), (os, "replace"), (os, "mkdir"), (tempfile, "mkstemp"), (Path, "write_bytes"))
"""What writing to a ledger is made of. Times between them are equally good moments; those around them are the risk."""


@dataclass(frozen=True)
class Moment:
    """When to kill: so many seconds after the work begins, or before its n-th file operation, counted from 1."""

    seconds: float | None = None
    operation: int | None = None

    def __str__(self) -> str:
        return f"operation {self.operation}" if self.operation else f"{1000 * (self.seconds or 0):.0f} ms"


@dataclass(frozen=True)
class Extent:
    """How long a piece of work takes when nothing kills it."""

    seconds: float
    operations: int

    def moment(self, chance: random.Random, *, early: float = 1.0) -> Moment:
        """A random moment in the first ``early`` share of the work."""
        if chance.random() < 0.5 or self.operations < 10:
            return Moment(seconds=chance.uniform(0, early * self.seconds))
        return Moment(operation=chance.randint(1, max(1, int(early * self.operations))))


def run(work: Callable[[], Any]) -> Any:
    """What the work returns, JSON-ready, from a process of its own: this one stays free of threads, and can fork.

    Raises:
        RuntimeError: the work failed; with its traceback.
    """
    reading, writing = os.pipe()
    if (child := os.fork()) == 0:
        leave(lambda: os.write(writing, json.dumps({"found": work()}).encode()), writing)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        told = json.loads(pipe.read() or b"{}")
    os.waitpid(child, 0)
    if "found" not in told:
        raise RuntimeError(told.get("failed", "the process died"))
    return told["found"]


def import_what_it_imports(work: Callable[[], Any]) -> None:
    """Do the work once elsewhere, and import here what it imported there, so that forked processes need not."""

    def imported() -> list[str]:
        before = {*sys.modules}
        work()
        return sorted(set(sys.modules) - before)

    for name in run(imported):
        with suppress(ImportError):
            importlib.import_module(name)


def measured(work: Callable[[], Any]) -> Extent:
    """Run the work to its end, counting."""

    def counted() -> list[float]:
        with _operations() as count:
            began = time.monotonic()
            work()
            return [time.monotonic() - began, count()]

    seconds, operations = run(counted)
    return Extent(seconds, int(operations))


def kill(work: Callable[[], Any], moment: Moment) -> bool:
    """Run the work, and kill it with SIGKILL at that moment; False if it had ended before."""
    if (child := os.fork()) == 0:
        with _operations(moment.operation):
            leave(work)
    if moment.seconds is not None:
        time.sleep(moment.seconds)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        raise RuntimeError(f"the work failed by itself before {moment}")
    return os.WIFSIGNALED(status)


def leave(work: Callable[[], Any], failures: int | None = None) -> None:
    """Do the work and end this process, as a process that was forked must: without its parent's cleaning up."""
    try:
        work()
    except BaseException:
        told = traceback.format_exc()
        if failures is None:
            os.write(2, told.encode())
        else:
            os.write(failures, json.dumps({"failed": told}).encode())
        os._exit(1)
    os._exit(0)


@contextmanager
def _operations(deadly: int | None = None) -> Iterator[Callable[[], int]]:
    """Count file operations; die before the ``deadly``-th."""
    count, originals = 0, [(owner, name, getattr(owner, name)) for owner, name in _OPERATIONS]

    def counting(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            if count == deadly:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)

        return call

    for owner, name, original in originals:
        setattr(owner, name, counting(original))
    try:
        yield lambda: count
    finally:
        for owner, name, original in originals:
            setattr(owner, name, original)
