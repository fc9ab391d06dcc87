"""Figures of the documentation, with where they come from: writes what stands between markers in the pages of docs/.

``python benchmarks/provenance.py`` after a benchmark has written its results. ``<!-- begin NAME -->`` ... ``<!-- end
NAME -->`` holds a table of ``TABLES`` made of ``results/*.json``, the command and the environment that made them, and
what of the targets was missed. tests/test_benchmark_pages.py fails while a page says something else.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
MARKED = re.compile(r"(?<=<!-- begin )([\w-]+)( -->\n)(.*?)(?=<!-- end \1 -->)", re.DOTALL)
ENVIRONMENT = ("python", "torch", "numpy", "transformers", "trl", "lightning")  # results hold more
Row = dict[str, Any]


@dataclass(frozen=True)
class Table:
    """Some columns of a result's rows; or, with ``across``, one row for each of the first column and one column for
    each value of ``across``, whose cells hold the other columns."""

    source: str
    columns: Sequence[str]
    across: str = ""
    keep: Callable[[Row], bool] = lambda row: True

    def text(self) -> str:
        """The table in Markdown."""
        found = json.loads((RESULTS / f"{self.source}.json").read_text())
        rows = [row for row in found["rows"] if self.keep(row)]
        lines = (
            self._pivoted(rows) if self.across else [self.columns, *([row[c] for c in self.columns] for row in rows)]
        )
        head, *body = [[shown(cell) for cell in line] for line in lines]
        table = [_line(head), "|" + "---|" * len(head), *(_line(line) for line in body)]
        return "\n".join([*table, "", *provenance(self.source, found)])

    def _pivoted(self, rows: list[Row]) -> list[list[Any]]:
        first, *cells = self.columns
        names, heads = (list(dict.fromkeys(row[key] for row in rows)) for key in (first, self.across))
        held: dict[tuple[Any, Any], list[str]] = {}
        for row in rows:  # several rows of one cell, such as seeds, stand side by side
            held.setdefault((row[first], row[self.across]), []).append(" / ".join(shown(row[cell]) for cell in cells))
        body = [[name, *(", ".join(held.get((name, head), [])) for head in heads)] for name in names]
        return [[first, *heads], *body]


def shown(value: Any) -> str:
    """A cell: three decimals, one above 10."""
    if value is None or isinstance(value, bool):
        return {None: "-", True: "yes", False: "no"}[value]
    if isinstance(value, float):
        return f"{value:.1f}" if abs(value) >= 10 else f"{value:.3f}"
    return str(value).replace("|", "\\|")


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def provenance(source: str, found: dict[str, Any]) -> list[str]:
    """Command, environment, link, and the checks that missed their targets."""
    environment, checks = found["environment"], found["checks"]
    versions = ", ".join(f"{name} {environment[name]}" for name in ENVIRONMENT if name in environment)
    missed = [f"{name} {shown(held['value'])} ({held['target']})" for name, held in checks.items() if not held["ok"]]
    threads = environment["threads"]
    command = re.sub(r" --(peers|cache|peer-python)( (?!--)\S+)+", "", found["command"])  # folders of that machine
    lines = [
        f"`{command}` on {environment['cpu']}, {threads} thread{'s' if threads != 1 else ''}; {versions}. "
        f"[All rows, notes and versions](../benchmarks/results/{source}.json).",
        f"Targets met: {len(checks) - len(missed)} of {len(checks)}.",
    ]
    return [*lines, *([f"Missed: {'; '.join(missed)}."] if missed else []), ""]


METHODS = ("noise floor", "random", "change", "subtract", "first_order", "propagate", "shadow", "replay", "auto")
BARS = ("noise floor", "random", *METHODS[3:])
TABLES = {
    "capture_overhead": Table(
        "capture_overhead", ("run", "step", "standard error", "flop bound", "coverage", "bytes per example")
    ),
    "distributed_overhead": Table(
        "distributed_overhead", ("training", "processes", "run", "step", "standard error", "with writer", "mean")
    ),
    "shadow_overhead": Table("shadow_overhead", ("run", "step", "standard error", "for the shadow", "bound")),
    "pass_cost": Table("pass_cost", ("model", "rows", "ratio", "±", "plain again", "bytes per example")),
    "pass_cost_peer": Table("pass_cost_peer", ("pass", "ratio", "±", "bound", "numbers per row")),
    "row_norms": Table("row_norms", ("model", "learning rate", "batch", "raw", "corrected")),
    "row_formats": Table(
        "row_formats",
        ("testbed", "rows", "recipe", "bytes per row", "cosine", "Pearson", "Spearman", "same of top 10", "LDS"),
        keep=lambda row: row["rows"] != "float32",
    ),
    "retrieval": Table(
        "retrieval", ("rows", "queries", "scan / raw", "both ends / raw", "speedup, source of 10 %", "both ends equal")
    ),
    "import_cost": Table("import_cost", ("statement", "over", "seconds", "of that")),
    "scale": Table(
        "scale",
        ("rows", "GB", "CPU s per GB", "over bare products", "peak MB", "of which before", "speedup, 2 processes",
         "2 scans at once", "same answer"),
    ),
    "query_latency": Table(
        "query_latency", ("who", "first answer", "next answers", "memory over the rows' bytes", "bytes per row")
    ),
    "stage_effects": Table(
        "stage_effects", ("method", "pearson", "rel. error"), "regime",
        keep=lambda row: row["method"] in METHODS and row["regime"] != "all",
    ),
    "stage_effects-bars": Table(
        "stage_effects", ("method", "bar spearman", "cell oracle", "query oracle", "of cells", "covered"),
        keep=lambda row: row["method"] in BARS and row["regime"] == "all",
    ),
    "spurious": Table("spurious", ("arm", "worst group"), "pipeline"),
    "influence_lds": Table("influence_lds", ("method", "LDS", "±"), "testbed"),
    "unrolled_loo": Table("unrolled_loo", ("training", "method", "one out", "s.e.", "5 % out", "half out", "cost")),
    "fact_tracing": Table(
        "fact_tracing", ("data", "ranking", "MRR", "MRR ±", "Recall@10", "tail-patch", "tail-patch ±")
    ),
    "mislabel": Table("mislabel", ("method", "AUC", "AUC ±", "AP"), "data"),
    "mislabel-self": Table(
        "mislabel", ("method", "AUC", "AUC ±", "AP"), "data",
        keep=lambda row: "validation" not in row["method"] or row["method"].startswith("gauss_newton"),
    ),
    "hallucination": Table(
        "hallucination", ("recipe", "AUC", "AUC, same names", "AP"), "task",
        keep=lambda row: row["query"] in ("", "contrast") and row["AUC"] != "",
    ),
    "forecast_poison": Table(
        "forecast_poison",
        ("seed", "planted found", "planted found, first slope", "of those not by chance", "trait removed, reweight",
         "useful kept, reweight", "trait removed, drop", "useful kept, drop"),
    ),
    "explorer": Table("explorer", ("what", "ms")),
    "forecast": Table("forecast", ("predictor", "R2", "R2, slope fitted", "within bar"), "regime"),
}  # fmt: skip


def filled(page: str) -> str:
    """A page with every table between markers as the results have it now."""

    def between(marked: re.Match[str]) -> str:
        return f"{marked[1]}{marked[2]}\n{TABLES[marked[1]].text()}\n"

    return MARKED.sub(between, page)


def pages() -> list[Path]:
    """The pages of the documentation that have markers."""
    return [path for path in sorted((ROOT / "docs").rglob("*.md")) if "<!-- begin " in path.read_text()]


if __name__ == "__main__":
    for path in pages():
        text = path.read_text()
        if (new := filled(text)) != text:
            path.write_text(new)
            print(f"wrote {path.relative_to(ROOT)}")
