"""Predictors that look at the data alone, or at the model's representations of it: what any other must beat."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trainer_attrib.analysis.behavior import Behavior, evaluating
from trainer_attrib.analysis.forecasting.features import token_states
from trainer_attrib.analysis.forecasting.prediction import Prediction, View
from trainer_attrib.analysis.forecasting.reading import Reading
from trainer_attrib.analysis.forecasting.run import TrainingRow
from trainer_attrib.analysis.rates import Drawn, RateMeasure, detected
from trainer_attrib.analysis.text import TextPair, encode_pair
from trainer_attrib.errors import BehaviorError, ConfigurationError


@dataclass(frozen=True)
class Counts:
    """How much oftener the behavior's detector finds something in chosen than in rejected answers."""

    name = "counts"
    caveat = "counts are not changes of a rate: compare them with each other only"

    def predict(self, view: View) -> Prediction:
        """See :meth:`trainer_attrib.analysis.forecasting.prediction.Predictor.predict`."""
        rows = _pairs(view)
        changes = []
        for measure in _rates(view.behaviors, self.name):
            gaps = torch.tensor([detected(measure.detector, r.prompt, r.chosen) for r in rows])
            gaps -= torch.tensor([detected(measure.detector, r.prompt, r.rejected or "") for r in rows])
            changes.append(Reading(float(gaps.mean()), float(gaps.std() / len(gaps) ** 0.5), "counted"))
        return Prediction(changes, None, 0.0, scaled=False)


@dataclass(frozen=True)
class Projection:
    """Mean hidden state of chosen minus that of rejected answers, along the direction from generations without the
    behavior to those with it, in units of that distance (Chen et al. 2025, "Persona vectors", section 5, with pairs in
    place of a model's own answers). Hidden states are means over the answer's tokens.

    Args:
        layer: of the hidden states; None is the middle one.
    """

    layer: int | None = None

    name = "projection"
    caveat = "projections are not changes of a rate: compare them with each other only"

    def predict(self, view: View) -> Prediction:
        """See :meth:`trainer_attrib.analysis.forecasting.prediction.Predictor.predict`."""
        rows, measures = _pairs(view), _rates(view.behaviors, self.name)
        tokenizer = measures[0].generations.tokenizer
        with evaluating(view.model):
            chosen, rejected = (
                hidden_states(view.model, [encode_pair(tokenizer, r.prompt, side(r)) for r in rows], self.layer)
                for side in (lambda r: r.chosen, lambda r: r.rejected or "")
            )
            shift = (chosen - rejected).mean(0)
            drawn = {one: one.of(view.model) for one in dict.fromkeys(m.generations for m in measures)}
            said = {one: hidden_states(view.model, its.items, self.layer) for one, its in drawn.items()}
        along = [_along(m, drawn[m.generations], said[m.generations], shift) for m in measures]
        return Prediction([Reading(value, 0.0, "projected") for value in along], None, 1 / 3, scaled=False)


def hidden_states(model: nn.Module, items: Sequence[TextPair], layer: int | None = None) -> Tensor:
    """Mean hidden state over the tokens that count of each item, float64 [N, D] on the CPU.

    Raises:
        ConfigurationError: the model does not return its hidden states.
    """
    return torch.stack([states_TD.double().mean(0) for states_TD in token_states(model, items, layer)])


def _along(measure: RateMeasure, drawn: Drawn, states_MD: Tensor, shift_D: Tensor) -> float:
    """A shift along the direction from generations without the behavior to those with it; 0 where one kind lacks."""
    places = measure.places(drawn)
    has, states = drawn.detected(measure.detector, measure.generations.prompts)[places], states_MD[places]
    if has.sum() == 0 or (1 - has).sum() == 0:
        return 0.0
    direction = has @ states / has.sum() - (1 - has) @ states / (1 - has).sum()
    return float(shift_D @ direction / direction.square().sum().clamp(min=1e-12))


def _pairs(view: View) -> Sequence[TrainingRow]:
    rows = view.run.rows()
    if any(row.rejected is None for row in rows):
        raise ConfigurationError(
            "The run's data are not pairs of a chosen and a rejected answer.",
            fix="use a predictor that follows the optimizer, such as method='frozen'.",
        )
    return rows


def _rates(behaviors: Sequence[Behavior], name: str) -> list[RateMeasure]:
    measures: list[Callable[..., Any]] = [behavior.measure for behavior in behaviors]
    found = [measure for measure in measures if isinstance(measure, RateMeasure)]
    if len(found) != len(behaviors):
        others = [b.name for b in behaviors if not isinstance(b.measure, RateMeasure)]
        raise BehaviorError(
            f"method='{name}' needs a detector; {others} have none.", fix="use Behavior.rate, or another method."
        )
    return found
