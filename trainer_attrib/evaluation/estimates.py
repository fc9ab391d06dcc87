"""A measured figure and how far it may be off."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from trainer_attrib.errors import EvaluationError


@dataclass(frozen=True)
class Estimate:
    """A figure with its standard error, over ``count`` things that it was measured on."""

    value: float
    standard_error: float
    count: int

    def __str__(self) -> str:
        return f"{self.value:.3f}" + ("" if np.isnan(self.standard_error) else f" ± {self.standard_error:.3f}")


def mean_of(values: np.ndarray) -> Estimate:
    """Mean of independent values [Q] and the standard error of the mean; nan, not known, of a single value."""
    error = values.std(ddof=1) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return Estimate(float(values.mean()), float(error), len(values))


def finite(name: str, values: Any, axes: str) -> np.ndarray:
    """The values as float64, which must be finite and have one axis per letter of ``axes`` (docs/conventions.md).

    Raises:
        EvaluationError: they have other axes, or something in them is not a finite number.
    """
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != len(axes) or 0 in array.shape:
        raise EvaluationError(
            f"{name} has shape {array.shape}, expected [{', '.join(axes)}] with nothing empty.",
            fix="pass one entry per query (Q), example (N), subset (M) or seed (S), in this order of axes.",
        )
    if broken := int((~np.isfinite(array)).sum()):
        raise EvaluationError(
            f"{broken} of the {array.size} entries of {name} are not finite.",
            cause="a method or a training that diverged; dropping these would make it look better than it is.",
            fix="repair or leave out the method, query or seed that they come from.",
        )
    return array


def same_length(**sizes: int) -> None:
    """Check that what is to be held side by side has one length; names say what was found.

    Raises:
        EvaluationError: lengths differ.
    """
    if len(set(sizes.values())) > 1:
        found = ", ".join(f"{name.replace('_', ' ')}: {size}" for name, size in sizes.items())
        raise EvaluationError(
            f"These belong together but have different lengths: {found}.",
            fix="bring them into one order of queries and examples; adapters.scores_of() orders scores by example ids.",
        )
