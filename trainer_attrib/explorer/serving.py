"""Start the explorer."""

from __future__ import annotations

import os
import socket
import threading
import webbrowser
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from trainer_attrib.analysis.analyzer import Analyzer
from trainer_attrib.analysis.forecasting.forecast import Forecast
from trainer_attrib.errors import ConfigurationError, MissingExtraError
from trainer_attrib.explorer.catalog import Catalog
from trainer_attrib.explorer.live import Desk, ForecastDesk, InfluenceDesk
from trainer_attrib.explorer.server import Explorer

ADDRESS = "127.0.0.1"


def explore(
    ledger: str | os.PathLike[str],
    *others: str | os.PathLike[str],
    model: nn.Module | None = None,
    tokenizer: Any = None,
    forecast: Forecast | None = None,
    port: int = 0,
    browser: bool = True,
    say: Callable[[str, str], object] = lambda told, url: print(told, flush=True),
) -> None:
    """Serve the pages of a ledger on this computer until interrupted.

    Args:
        ledger: directory or URL.
        others: ledgers to compare with.
        model: at the end of a recorded stage, for questions from the page. Needs ``tokenizer``.
        tokenizer: of the model.
        forecast: of a run that has not begun, whose data the page may reshape.
        port: 0 takes a free one.
        browser: open the page.
        say: is told a sentence and the address in it.

    Raises:
        MissingExtraError: without the extra ``ui``.
        ConfigurationError: a model without its tokenizer, or a port that is taken.
        LedgerError: there is no ledger, or it cannot be read.
    """
    with Served(explorer_of([ledger, *others], model, tokenizer, forecast), port) as served:
        say(f"{served.url}  (Ctrl-C stops it)", served.url)
        if browser:
            threading.Thread(target=webbrowser.open, args=(served.url,), daemon=True).start()
        served.wait()


def explorer_of(
    ledgers: Sequence[str | os.PathLike[str]],
    model: nn.Module | None = None,
    tokenizer: Any = None,
    forecast: Forecast | None = None,
) -> Explorer:
    """What a server needs to know; see :func:`explore`."""
    if (model is None) != (tokenizer is None):
        raise ConfigurationError("A model and its tokenizer belong together.", fix="pass both, or neither.")
    catalogs = [Catalog(ledger) for ledger in ledgers]
    desks: list[Desk] = []
    if model is not None:
        desks.append(InfluenceDesk(catalogs[0], Analyzer(ledgers[0], model), tokenizer))
    if forecast is not None:
        desks.append(ForecastDesk(catalogs[0], forecast))
    return Explorer(catalogs, desks)


class Served:
    """A server in a thread of its own, inside ``with``.

    Raises:
        ConfigurationError: the port is taken.
    """

    def __init__(self, explorer: Explorer, port: int = 0) -> None:
        try:
            import uvicorn
        except ImportError:
            raise MissingExtraError("uvicorn", "ui") from None
        self._socket = socket.socket()
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            self._socket.bind((ADDRESS, port))
        except (OSError, OverflowError) as error:
            self._socket.close()
            raise ConfigurationError(f"Port {port} cannot be used: {error}.", fix="leave the port out.") from None
        self.port = self._socket.getsockname()[1]
        self.url = f"http://{ADDRESS}:{self.port}/"
        hosts = [f"{ADDRESS}:{self.port}", f"localhost:{self.port}"]
        settings = uvicorn.Config(explorer.app(hosts), log_level="warning", access_log=False, lifespan="off")
        self._server = uvicorn.Server(settings)
        self._thread = threading.Thread(target=self._server.run, args=([self._socket],), daemon=True, name="explorer")

    def __enter__(self) -> Served:
        self._socket.listen()  # requests wait until the server runs
        self._thread.start()
        return self

    def wait(self) -> None:
        """Until it ends, or Ctrl-C."""
        try:
            while self._thread.is_alive():
                self._thread.join(0.5)
        except KeyboardInterrupt:
            pass

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = True
        self._thread.join(5)
        self._socket.close()
