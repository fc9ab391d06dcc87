"""A ledger at a glance: the tree of stages as data and as text."""

from __future__ import annotations

from typing import Any

from trainer_attrib.ledger.links import Link
from trainer_attrib.ledger.reader import Ledger, StageReader


def overview(ledger: Ledger) -> dict[str, Any]:
    """Every stage with its parent, status, counts and sizes, JSON-ready, parents before children."""
    return {
        "ledger": ledger.storage.url,
        "format": ledger.meta["format"],
        "parameters": sum(_numel(shape) for shape in ledger.meta["parameters"].values()),
        "stages": [_stage(stage) for stage in ledger.stages()],
    }


def tree_lines(found: dict[str, Any]) -> list[str]:
    """The tree as text, children indented under their parents."""
    lines = [f"{found['ledger']}: {len(found['stages'])} stages of a model with {found['parameters']:,} parameters"]
    children: dict[str | None, list[dict[str, Any]]] = {}
    for stage in found["stages"]:
        children.setdefault(stage["parent"], []).append(stage)

    def show(parent: str | None, indent: str) -> None:
        for stage in children.get(parent, []):
            lines.append(f"{indent}{stage['name']}  {_facts(stage)}")
            show(stage["name"], indent + "    ")

    show(None, "  ")
    return lines


def _stage(stage: StageReader) -> dict[str, Any]:
    meta = stage.meta
    return {
        "name": stage.name,
        "parent": stage.parent,
        "link": Link.of(meta).to_dict(),
        "link_changes": Link.of(meta).changes,
        "status": meta["status"],
        "reason": meta["reason"],
        "steps": stage.count("steps"),
        "rows": stage.count("rows"),
        "examples": stage.count("examples"),
        "bytes": stage.bytes,
        "snapshots": [snapshot["name"] for snapshot in meta["snapshots"]],
        "second_moment_versions": len(meta["versions"]),
        "optimizers": [optimizer["class"] for optimizer in meta["optimizers"]],
        "processes": meta["processes"],
        "coverage": (meta["coverage"] or {}).get("share"),
        "overhead": meta["overhead"],
    }


def _facts(stage: dict[str, Any]) -> str:
    optimizers = " and ".join(name.rsplit(".", 1)[-1] for name in stage["optimizers"])
    facts = [
        stage["status"] + (f" ({stage['reason']})" if stage["reason"] else ""),
        f"{stage['steps']:,} steps of {optimizers}",
        f"{stage['rows']:,} rows of {stage['examples']:,} examples",
        f"{stage['bytes'] / 1e6:.1f} MB",
        f"{len(stage['snapshots'])} snapshots",
    ]
    if stage["processes"] > 1:
        facts.append(f"{stage['processes']} processes")
    facts += [stage["link_changes"]] if stage["link_changes"] else []
    return ", ".join(facts)


def _numel(shape: list[int]) -> int:
    count = 1
    for length in shape:
        count *= length
    return count
