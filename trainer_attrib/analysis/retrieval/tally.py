"""Counts of the rows that are not compared like the others."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Tally:
    """Rows that are left out, by reason, and rows that are compared although they are in a scaling of their own."""

    left_out: dict[str, int] = field(default_factory=dict)
    raw: int = 0

    def skip(self, reason: str, rows: int) -> None:
        """Leave out some more."""
        if rows:
            self.left_out[reason] = self.left_out.get(reason, 0) + rows

    def add(self, other: Tally) -> None:
        """Those of another part."""
        self.raw += other.raw
        for reason, rows in other.left_out.items():
            self.skip(reason, rows)
