"""Which rows to score."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from trainer_attrib.errors import ConfigurationError


@dataclass(frozen=True, kw_only=True)
class Where:
    """Conditions that rows must meet, all of them; None is no condition. Rows that do not are never read.

    Args:
        sources: names of the data sources of the examples.
        steps: first and last optimizer step in which the row was trained on, both included.
        ids: of the examples.

    Raises:
        ConfigurationError: a name instead of a collection of names, or steps in the wrong order.
    """

    sources: Collection[str] | None = None
    steps: tuple[int, int] | None = None
    ids: Collection[str] | None = None

    def __post_init__(self) -> None:
        for name in ("sources", "ids"):
            value = getattr(self, name)
            if isinstance(value, str):
                raise ConfigurationError(f"Where got {name}={value!r}, a single string.", fix=f"pass [{value!r}].")
            object.__setattr__(self, name, None if value is None else frozenset(value))
        if self.steps is not None and (len(self.steps) != 2 or self.steps[0] > self.steps[1]):
            raise ConfigurationError(f"Where got steps={self.steps!r}.", fix="pass (first, last), both included.")

    def of_stage(self, sources: Callable[[], dict[str, str | None]]) -> Callable[[pa.Table], np.ndarray]:
        """The test for the rows of one stage: their table -> bool [N].

        Args:
            sources: reads the source of each of the stage's examples; called only if a condition needs them.
        """
        allowed = None if self.ids is None else set(self.ids)
        if self.sources is not None:
            of_sources = {example for example, source in sources().items() if source in self.sources}
            allowed = of_sources if allowed is None else allowed & of_sources

        def passes(table: pa.Table) -> np.ndarray:
            found = np.ones(table.num_rows, bool)
            if self.steps is not None:
                steps = table["step"].to_numpy()
                found &= (steps >= self.steps[0]) & (steps <= self.steps[1])
            if allowed is not None and found.any():
                found &= np.array([example in allowed for example in table["example"].to_pylist()], bool)
            return found

        return passes
