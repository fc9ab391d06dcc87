"""What every benchmark shares: the environment beside the figures, checks with targets, one table, one JSON file."""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
_PACKAGES = ("trainer-attrib", "torch", "numpy", "transformers", "trl", "accelerate", "peft", "datasets", "lightning",
             "pytorch-lightning", "lion-pytorch", "schedulefree", "bitsandbytes")  # fmt: skip


def parser(description: str) -> argparse.ArgumentParser:
    """The arguments every benchmark takes."""
    arguments = argparse.ArgumentParser(description=description)
    arguments.add_argument("--quick", action="store_true", help="minutes on 2 cores; writes nothing")
    arguments.add_argument("--seeds", type=int, default=None, help="repetitions")
    return arguments


def parser_with_peer(description: str) -> argparse.ArgumentParser:
    """The same, and ``--peer-python`` of the environment that has the closest peer (benchmarks/README.md)."""
    arguments, here = parser(description), Path(__file__).parent.parent / ".venv-peer" / "bin" / "python"
    found = Path(os.environ.get("TRAINER_ATTRIB_PEER_PYTHON", here))
    arguments.add_argument("--peer-python", type=Path, default=found, help="of the environment that has the peer")
    return arguments


def check(value: float, target: float, *, most: bool = True) -> dict[str, Any]:
    """A figure held against its target; a failed check stays in the file."""
    ok = value <= target if most else value >= target
    return {"value": round(value, 4), "target": f"{'<=' if most else '>='} {target}", "ok": ok}


def publish(
    name: str,
    rows: list[dict[str, Any]],
    checks: dict[str, Any],
    *,
    quick: bool,
    notes: Sequence[str] = (),
    details: Mapping[str, Any] | None = None,
) -> None:
    """Print the table, notes and checks; write the JSON file unless quick, with details that the table leaves out."""
    columns = list(rows[0])
    cells = [[_shown(row[column]) for column in columns] for row in rows]
    widths = [max(len(c[i]) for c in [columns, *cells]) for i in range(len(columns))]
    for line in [columns, *cells]:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    for note in notes:
        print(f"- {note}")
    for label, held in checks.items():
        print(f"{'ok  ' if held['ok'] else 'MISS'} {label}: {held['value']} (target {held['target']})")
    if not quick:
        RESULTS.mkdir(exist_ok=True)
        command = " ".join(["python", f"benchmarks/{name}.py", *map(_anywhere, sys.argv[1:])])
        data = {"environment": _environment(), "command": command, "rows": rows, "notes": [*notes], "checks": checks}
        (RESULTS / f"{name}.json").write_text(_text(data, details or {}))


def _text(data: Mapping[str, Any], details: Mapping[str, Any]) -> str:
    """JSON with the items of a detail on a line each: there may be thousands."""
    told = json.dumps(data, indent=1).removesuffix("\n}")
    for name, value in details.items():
        lines = [f"  {json.dumps(item)}" for item in value] if isinstance(value, list) else []
        told += f",\n {json.dumps(name)}: " + ("[\n" + ",\n".join(lines) + "\n ]" if lines else json.dumps(value))
    return told + "\n}\n"


def _anywhere(argument: str) -> str:
    """An argument as others may read it: where files are on this machine is nobody's business."""
    return re.sub(r"/.*/", "", argument) if argument.startswith("/") or "=/" in argument else argument


def _environment() -> dict[str, Any]:
    found = {"python": platform.python_version(), "machine": platform.machine(), "cpu": _cpu()}
    found["threads"] = torch.get_num_threads()
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if "model name" in line]
    return names[0] if names else platform.processor()


def _shown(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)
