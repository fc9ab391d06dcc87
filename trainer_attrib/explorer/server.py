"""The live page: a server on this computer for this computer, which reads and answers and never writes what it is told.

Work that a page asks for needs the page's token in a header, which other pages of the browser cannot send.
"""

from __future__ import annotations

import secrets
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from trainer_attrib.errors import (
    ConfigurationError,
    LedgerNotFoundError,
    MissingExtraError,
    StageNotFoundError,
    TrainerAttribError,
)
from trainer_attrib.explorer.catalog import Catalog
from trainer_attrib.explorer.jobs import Jobs
from trainer_attrib.explorer.live import Desk
from trainer_attrib.explorer.shell import LIVE_POLICY, SCRIPTS, STYLE, asset, live_page
from trainer_attrib.ledger.kept import key_of
from trainer_attrib.version import __version__

try:
    from starlette.applications import Starlette
    from starlette.concurrency import run_in_threadpool
    from starlette.requests import Request
    from starlette.responses import JSONResponse, RedirectResponse, Response
    from starlette.routing import Route
except ImportError as error:
    raise MissingExtraError(error.name or "starlette", "ui") from None

TOKEN = "x-trainer-attrib"
_TYPES = {"js": "text/javascript", "css": "text/css"}


class Explorer:
    """What the server knows.

    Args:
        catalogs: ledgers that can be looked at, the first one first.
        desks: for questions about the first one that need the model.
    """

    def __init__(self, catalogs: Sequence[Catalog], desks: Sequence[Desk] = ()) -> None:
        self.catalogs, self.desks = list(catalogs), {desk.kind: desk for desk in desks}
        self.jobs, self.token = Jobs(), secrets.token_urlsafe(24)

    @property
    def names(self) -> list[str]:
        """Of the ledgers, all different."""
        names = [catalog.name for catalog in self.catalogs]
        return [name if names.count(name) == 1 else f"{name} ({place})" for place, name in enumerate(names, 1)]

    def app(self, hosts: Sequence[str]) -> Guard:
        """The ASGI application.

        Args:
            hosts: values of the Host header that are answered, with the port: a page of another name that resolves to
                this computer (DNS rebinding) is not.
        """
        routes = [
            Route("/", self._page), Route("/session.json", self._session),
            Route("/assets/{name:path}", self._asset), Route("/ask/{kind}.json", self._ask),
            Route("/jobs/{job}.json", self._job), Route("/jobs/{job}/cancel.json", self._cancel),
            Route("/{ledger:int}/{path:path}", self._data),
        ]  # fmt: skip
        return Guard(Starlette(routes=routes), hosts)

    async def _page(self, request: Request) -> Response:
        return Response(live_page(self.token), media_type="text/html")

    async def _session(self, request: Request) -> Response:
        told = {kind: desk.told() for kind, desk in self.desks.items()}
        return JSONResponse({"ledgers": self.names, "desks": told, "version": __version__})

    async def _asset(self, request: Request) -> Response:
        name = request.path_params["name"]
        if name not in (*SCRIPTS, STYLE):
            return _missing(name)
        return Response(asset(name), media_type=_TYPES[name.rsplit(".", 1)[1]])

    async def _data(self, request: Request) -> Response:
        number, path = request.path_params["ledger"], request.path_params["path"]
        if number >= len(self.catalogs):
            return _missing(str(number))
        if not path.endswith(".json"):
            return RedirectResponse(f"/#/{number}/{path}")
        catalog, asked, path = self.catalogs[number], dict(request.query_params), path.removesuffix(".json")
        if path.startswith("map/") and (pending := await self._pending_map(request, catalog, path)):
            return pending
        return await _told(lambda: catalog.data(path, asked))

    async def _pending_map(self, request: Request, catalog: Catalog, path: str) -> Response | None:
        """A map takes a look at every row: a job, unless it is there."""
        name = path.removeprefix("map/")
        known = {stage.name for stage in catalog.ledger.stages()}
        if name not in known or await run_in_threadpool(catalog.has_map, name):
            return None
        if refused := self._refused(request):
            return refused

        def work() -> str:
            catalog.map(name)
            return ""

        return JSONResponse(self.jobs.start(f"map of {name}", work).told(), 202)

    async def _ask(self, request: Request) -> Response:
        if refused := self._refused(request):
            return refused
        desk = self.desks.get(request.path_params["kind"])
        if desk is None:
            return _missing(request.path_params["kind"])
        try:
            work = desk.work(dict(request.query_params))
        except TrainerAttribError as error:
            return _wrong(error)
        if await run_in_threadpool(self.catalogs[0].answers.has, key_of(work.asked)):
            return JSONResponse({"state": "done", "answer": key_of(work.asked), "known": True})
        return JSONResponse(self.jobs.start(work.title, work.run).told(), 202)

    async def _job(self, request: Request) -> Response:
        return await _told(lambda: self.jobs.of(request.path_params["job"]).told())

    async def _cancel(self, request: Request) -> Response:
        if refused := self._refused(request):
            return refused

        def cancel() -> dict[str, Any]:
            job = self.jobs.of(request.path_params["job"])
            job.cancelled = True
            return job.told()

        return await _told(cancel)

    def _refused(self, request: Request) -> Response | None:
        given = request.headers.get(TOKEN, "")
        if secrets.compare_digest(given.encode(), self.token.encode()):
            return None
        return JSONResponse({"error": "Only the explorer's own page can start or stop work."}, 403)


class Guard:
    """Answers GET and HEAD for its own host names only, and says what a browser may do with what it gets."""

    def __init__(self, app: Starlette, hosts: Sequence[str]) -> None:
        self._app, self._hosts = app, {host.lower() for host in hosts}

    async def __call__(self, scope: Any, receive: Any, send: Callable[[Any], Awaitable[None]]) -> None:
        """ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        host = dict(scope["headers"]).get(b"host", b"").decode("latin-1").lower()
        refused = None
        if host not in self._hosts:
            refused = JSONResponse({"error": f"This server does not answer for {host[:80]!r}."}, 421)
        elif scope["method"] not in ("GET", "HEAD"):
            refused = JSONResponse({"error": "Only reading is allowed."}, 405, {"allow": "GET, HEAD"})

        async def guarded(message: Any) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message["headers"], *_HEADERS]}
            await send(message)

        await (refused or self._app)(scope, receive, guarded)


_HEADERS = [
    (name.encode(), value.encode())
    for name, value in {
        "content-security-policy": LIVE_POLICY + "; frame-ancestors 'none'",
        "x-content-type-options": "nosniff", "referrer-policy": "no-referrer", "cache-control": "no-store",
        "cross-origin-resource-policy": "same-origin", "cross-origin-opener-policy": "same-origin",
    }.items()
]  # fmt: skip


async def _told(data: Callable[[], dict[str, Any]]) -> Response:
    try:
        return JSONResponse(await run_in_threadpool(data))
    except (LedgerNotFoundError, StageNotFoundError) as error:
        return _wrong(error, 404)
    except TrainerAttribError as error:
        return _wrong(error)
    except LookupError as error:
        return _missing(str(error))


def _wrong(error: TrainerAttribError, status: int = 400) -> Response:
    return JSONResponse({"error": str(error)}, status if not isinstance(error, ConfigurationError) else 400)


def _missing(name: str) -> Response:
    return JSONResponse({"error": f"There is nothing at {name[:200]!r}."}, 404)
