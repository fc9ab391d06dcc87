"""A plan for a data set: which examples count how much, which are turned around, and which tokens are left out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from trainer_attrib.analysis.cleaning import Rows
from trainer_attrib.errors import MissingDataError

COLUMNS = ("plan_weight", "plan_offset", "plan_flip", "plan_mask")


@dataclass(frozen=True)
class Plan:
    """What to do with each of N examples.

    Args:
        ids: of the examples.
        weights: float64 [N], what each example's loss is multiplied by; 0 leaves it out.
        offsets: float64 [N], added to the margin of a preference loss: an example that seems learned pushes less.
        flipped: bool [N], whose chosen and rejected answers change places.
        masked: by number of the example, places of tokens of the chosen and of the rejected answer that do not count.
    """

    ids: tuple[str, ...]
    weights: np.ndarray
    offsets: np.ndarray
    flipped: np.ndarray
    masked: Mapping[int, tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=dict)

    @staticmethod
    def keeping(ids: Sequence[str], **changes: Any) -> Plan:
        """The plan that changes nothing but what is given."""
        count = len(ids)
        blank: dict[str, Any] = {
            "weights": np.ones(count), "offsets": np.zeros(count), "flipped": np.zeros(count, bool), "masked": {}
        }  # fmt: skip
        return Plan(tuple(ids), **{**blank, **changes})

    @property
    def dropped(self) -> np.ndarray:
        """Which examples are left out, bool [N]."""
        return self.weights == 0

    @property
    def taken_away(self) -> float:
        """Share of the data's weight that is taken away: by weights below 1, offsets (which weigh by 2 sigma(-offset)
        at the first step), and flips."""
        weights = self.effective
        return float(np.maximum(0, 1 - weights).clip(max=1).mean())

    @property
    def effective(self) -> np.ndarray:
        """What each example's first-order contribution is multiplied by at the first step, float64 [N]."""
        signs = np.where(self.flipped, -1.0, 1.0)
        return signs * self.weights * 2 / (1 + np.exp(self.offsets))

    def of_rows(self, ids: Sequence[str]) -> Plan:
        """The plan for a data set of these rows, in their order.

        Raises:
            MissingDataError: there are rows that the plan does not know.
        """
        where = {example: number for number, example in enumerate(self.ids)}
        if missing := [example for example in ids if example not in where]:
            raise MissingDataError(
                f"{len(missing)} of {len(ids)} rows are not in the plan: {missing[:3]}; its rows are {self.ids[:3]}.",
                cause="the plan was made for another data set, or its rows are named by another column.",
                fix="pass the data set that was forecast, with its `id_column`.",
            )
        numbers = [where[example] for example in ids]
        masked = {place: self.masked[number] for place, number in enumerate(numbers) if number in self.masked}
        return Plan(tuple(ids), self.weights[numbers], self.offsets[numbers], self.flipped[numbers], masked)

    def columns(self, dataset: Any, id_column: str = "id") -> dict[str, list[Any]]:
        """The plan as columns of the data set that it was made for.

        Raises:
            MissingDataError: the data set has rows that the plan does not know.
        """
        own = self.of_rows(Rows(dataset, id_column).ids)
        return {
            "plan_weight": own.weights.tolist(),
            "plan_offset": own.offsets.tolist(),
            "plan_flip": own.flipped.tolist(),
            "plan_mask": [[list(side) for side in own.masked.get(place, ((), ()))] for place in range(len(own.ids))],
        }
