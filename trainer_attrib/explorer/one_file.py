"""A ledger and the answers kept in it as one HTML file that loads nothing."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from trainer_attrib.explorer.catalog import Catalog
from trainer_attrib.explorer.shell import one_file
from trainer_attrib.report.page import write_text
from trainer_attrib.version import __version__

EXAMPLES, MAPPED = 1000, 20_000  # examples listed, and placed on maps


def write_report(ledger: str | os.PathLike[str], path: str | os.PathLike[str], title: str = "") -> Path:
    """Write the explorer's page with a ledger's data in it; an existing file is replaced only by a complete one.

    Every answer is in it; of the examples the first 1000, and maps of stages of at most 20,000.

    Args:
        ledger: directory or URL.
        path: of the file.
        title: of the page; the ledger's name by default.

    Raises:
        LedgerError: there is no ledger, or it cannot be read.
    """
    catalog = Catalog(ledger)
    title = title or catalog.name
    return write_text(path, one_file(f"{title} · trainer-attrib", bundle_of(catalog, title)))


def bundle_of(catalog: Catalog, title: str) -> dict[str, Any]:
    """Address -> data, as the server would give it."""
    facets = catalog.data("facets", {})
    paths = ["ledger", "facets", "answers"]
    paths += [f"answers/{head['key']}" for head in catalog.data("answers", {})["answers"]]
    for name, stage in facets["stages"].items():
        paths += [f"map/{name}"] if stage["examples"] <= MAPPED else []
    paths += [f"curves/{stage.name}" for stage in catalog.ledger.stages()]
    bundle = {f"0/{path}": catalog.data(path, {}) for path in paths}
    bundle["0/examples"] = catalog.data("examples", {"limit": str(EXAMPLES)})
    bundle["session"] = {"ledgers": [title], "desks": {}, "version": __version__}
    return bundle
