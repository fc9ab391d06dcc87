"""Which tokens of a pair carry what it teaches."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from trainer_attrib.analysis.behavior import evaluating
from trainer_attrib.analysis.displacement import Displacement
from trainer_attrib.analysis.forecasting.prediction import View
from trainer_attrib.analysis.forward_mode import Slopes
from trainer_attrib.analysis.text import IGNORED, TextPair, token_losses
from trainer_attrib.errors import ConfigurationError

CARRIES = 0.8
"""Share of a pair's contribution that its masked tokens carry."""


def masked_tokens(
    view: View, direction: Displacement, rows: Sequence[int]
) -> dict[int, tuple[tuple[int, ...], tuple[int, ...]]]:
    """For some pairs, the tokens of chosen and rejected answer that carry most of what the pair pushes along a
    direction of the weights: those whose log-probability rises (chosen) or falls (rejected) fastest along it, as many
    as together carry 80 % of the push.

    Args:
        view: inside the run's ``undisturbed()``.
        direction: towards more of a behavior.
        rows: numbers of the pairs.

    Raises:
        ConfigurationError: the run does not say of which tokens its pairs consist.
    """
    tokens_of = getattr(view.run, "answer_tokens", None)
    if tokens_of is None:
        raise ConfigurationError(
            f"{type(view.run).__name__} does not say of which tokens its answers consist.", fix="use how='reweight'."
        )
    found = {}
    with view.run.undisturbed(), evaluating(view.model):
        slopes = Slopes(view.model, direction)
        for row in rows:
            prompt, *answers = tokens_of(row)
            items = [TextPair((*prompt, *a), (*[IGNORED] * len(prompt), *a)) for a in answers]
            risen = -slopes(lambda model, items=items: token_losses(model, items)).numpy()
            parts = [
                sign * risen[side, len(prompt) : len(prompt) + len(answer)] * len(answer)
                for side, (sign, answer) in enumerate(zip((1, -1), answers, strict=True))
            ]
            found[row] = _carrying(parts)
    return found


def _carrying(parts: Sequence[np.ndarray]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    flat = np.concatenate(parts)
    order = np.argsort(-flat, kind="stable")
    sums, wanted = np.cumsum(flat[order]), CARRIES * max(flat[flat > 0].sum(), 0.0)
    count = int(np.searchsorted(sums, wanted)) + 1 if wanted > 0 else 0
    chosen = set(order[:count].tolist())
    first = len(parts[0])
    return (
        tuple(place for place in range(first) if place in chosen),
        tuple(place for place in range(len(parts[1])) if place + first in chosen),
    )
