"""The recorded stages as blocks of a page."""

from __future__ import annotations

from collections.abc import Sequence

from trainer_attrib.ledger.reader import StageReader
from trainer_attrib.report.blocks import Block, Curve, Curves, Grid


def ledger_blocks(stages: Sequence[StageReader]) -> list[Block]:
    """A table of the stages and their loss curves."""
    columns = ("stage", "status", "parent", "steps", "rows", "examples", "MB", "coverage", "overhead", "audit residual")
    rows, curves = [], []
    for stage in stages:
        steps = stage.steps()
        residuals = [r for r in steps["audit_residual"].to_pylist() if r is not None and r == r]
        rows.append(
            (
                stage.name,
                stage.meta["status"],
                stage.parent or "-",
                steps.num_rows,
                stage.count("rows"),
                stage.count("examples"),
                round(stage.bytes / 1e6, 1),
                f"{(stage.meta['coverage'] or {}).get('share', 0):.0%}",
                "n/a" if stage.meta["overhead"] is None else f"{stage.meta['overhead']:.0%}",
                max(residuals, default=float("nan")),
            )
        )
        losses = [float("nan") if loss is None else loss for loss in steps["loss"].to_pylist()]
        curves.append(Curve(f"{stage.name} loss", steps["step"].to_pylist(), losses))
    note = "Audit residual: the largest share of any audited gradient that the captured rows do not explain."
    return [Grid("Recorded stages", columns, rows, note), Curves("Training loss", curves)]
