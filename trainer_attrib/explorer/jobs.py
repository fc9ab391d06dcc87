"""Long work behind a page: one piece at a time, seen from outside, stopped when nobody wants it."""

from __future__ import annotations

import logging
import secrets
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from trainer_attrib.errors import CancelledError, TrainerAttribError
from trainer_attrib.progress import watched

REMEMBERED = 50
_log = logging.getLogger(__name__)


@dataclass
class Job:
    """A piece of work; a :class:`trainer_attrib.progress.Watch` of itself."""

    id: str
    title: str
    state: str = "waiting"
    """Then running, and at last done, cancelled or failed."""
    doing: str = ""
    done: int = 0
    total: int | None = None
    answer: str | None = None
    error: str = ""
    cancelled: bool = False

    def advanced(self, title: str, done: int, total: int | None) -> None:
        """See :class:`trainer_attrib.progress.Watch`."""
        self.doing, self.done, self.total = title, done, total

    def told(self) -> dict[str, Any]:
        """JSON-ready."""
        return {"job": self.id, "title": self.title, "state": self.state, "doing": self.doing, "done": self.done,
                "total": self.total, "answer": self.answer, "error": self.error}  # fmt: skip


class Jobs:
    """Runs work in threads, one after another: a model that is moved through displacements can be looked at by one
    only."""

    def __init__(self) -> None:
        self._jobs: dict[str, Job] = {}
        self._one = threading.Lock()

    def start(self, title: str, work: Callable[[], str]) -> Job:
        """Begin when those before are done; ``work`` returns the key of its answer."""
        job = Job(secrets.token_hex(8), title)
        self._jobs[job.id] = job
        for old in [one for one in self._jobs.values() if one.state not in ("waiting", "running")][:-REMEMBERED]:
            del self._jobs[old.id]
        threading.Thread(target=self._run, args=(job, work), daemon=True, name=f"explorer {title}").start()
        return job

    def of(self, number: str) -> Job:
        """A job by its id.

        Raises:
            LookupError: there is none.
        """
        return self._jobs[number]

    def _run(self, job: Job, work: Callable[[], str]) -> None:
        with self._one:
            if job.cancelled:
                job.state = "cancelled"
                return
            job.state = "running"
            try:
                with watched(job):
                    job.answer = work()
                job.state = "done"
            except CancelledError:
                job.state = "cancelled"
            except TrainerAttribError as error:
                job.error, job.state = str(error), "failed"
            except Exception as error:
                _log.exception("%s failed", job.title)
                job.error, job.state = f"{type(error).__name__}: {error}", "failed"
