"""Before a run: what it would do to behaviors, which examples would do it, and how to change the data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, get_args

from trainer_attrib.analysis.behavior import Behavior
from trainer_attrib.analysis.forecasting.baselines import Counts, Projection
from trainer_attrib.analysis.forecasting.contributions import contributions
from trainer_attrib.analysis.forecasting.features import Encoder, FeatureView, feature_view
from trainer_attrib.analysis.forecasting.path import Along
from trainer_attrib.analysis.forecasting.planning import Wish
from trainer_attrib.analysis.forecasting.prediction import Prediction, Predictor, View
from trainer_attrib.analysis.forecasting.predictors import Frozen, GradientDot, Linearised, LookAhead, Warm
from trainer_attrib.analysis.forecasting.reading import Readings
from trainer_attrib.analysis.forecasting.regime import regime_of
from trainer_attrib.analysis.forecasting.reshaping import Reshaping, reshape
from trainer_attrib.analysis.forecasting.results import Contributions, Shift, Shifts
from trainer_attrib.analysis.forecasting.run import Run
from trainer_attrib.analysis.training_state import fingerprint_of
from trainer_attrib.errors import ConfigurationError

COVERED, FEW = 1.28, 1.9
"""Standard errors in an error bar, which is to hold four out of five true values: those over queries and samples, and
those of two halves of the batches, whose scale is poorly known."""
FROZEN = {"lazy": 0.1, "moderate": 0.1, "strong": 0.25, "unknown": 0.25}
"""What frozen gradients may be wrong by, as a share of the prediction, beside the disagreement with a predictor of
another kind: chosen on seed 0 of benchmarks/forecast.py, whose other seeds test it."""
METHODS: dict[str, Predictor] = {
    method.name: method
    for method in (Frozen(), Warm(), Linearised(), LookAhead(), GradientDot(), Counts(), Projection())
}
"""What a string stands for."""


@dataclass(frozen=True, repr=False)
class Forecast(Shifts):
    """Predicted changes of behaviors, and what can be asked about them while the run has not begun."""

    view: View | None = field(default=None, compare=False)
    predictor: Predictor | None = field(default=None, compare=False)
    _told: dict[tuple[tuple[int, ...], Along], Contributions] = field(default_factory=dict, compare=False)

    def contributions(self, behaviors: Sequence[str] | None = None, *, along: Along = "start") -> Contributions:
        """What each example adds to the predicted change: a pass over all examples, one by one; remembered.

        Args:
            behaviors: names; all by default.
            along: "start" takes the behaviors' gradients at the first weights: contributions add up to the linear
                prediction. "path" averages them over the way to the weights that ``warm`` predicts: they add up to its
                measured prediction. For behaviors that change much, and traits that are rare before the run.

        Raises:
            BehaviorError: a behavior has no gradient.
            ConfigurationError: unknown names or way, or a run whose examples cannot be listed.
        """
        view = self._view()
        names = [behavior.name for behavior in view.behaviors]
        if unknown := sorted(set(behaviors or ()) - set(names)):
            raise ConfigurationError(f"No behaviors {unknown}.", fix=f"choose among {names}.")
        if along not in get_args(Along):
            raise ConfigurationError(f"along={along!r}", fix=f"use one of {list(get_args(Along))}.")
        chosen = tuple(number for number, name in enumerate(names) if behaviors is None or name in behaviors)
        if (chosen, along) not in self._told:
            with view.run.undisturbed():
                self._told[chosen, along] = contributions(view, chosen, along)
        return self._told[chosen, along]

    def reshape(
        self,
        keep_below: Mapping[str, float] | None = None,
        keep_above: Mapping[str, float] | None = None,
        *,
        protect: Sequence[str] | None = None,
        drop_at_most: float = 1.0,
        how: str = "reweight",
    ) -> Reshaping:
        """Change the data so that the run does not do something, and forecast again.

        Args:
            keep_below: behavior -> largest predicted change.
            keep_above: behavior -> smallest predicted change.
            protect: behaviors whose predicted change must stay; all others by default.
            drop_at_most: largest share of the data's weight that may be taken away.
            how: "reweight" (the least change of weights that does it, a quadratic program), "drop", "flip", "offset"
                (of the preference margin), or "mask" (of tokens).

        Raises:
            ConfigurationError: unknown behaviors, a share outside [0, 1], nothing is asked for, or a forecast by
                baselines alone.
            BehaviorError: a behavior has no gradient.
        """
        view = self._view()
        names = [behavior.name for behavior in view.behaviors]
        wish = Wish.of(names, keep_below or {}, keep_above or {}, protect, drop_at_most)
        if self.predictor is None:
            raise ConfigurationError(
                "This forecast comes from baselines alone.",
                fix="forecast by a method that follows the optimizer, such as 'frozen', first.",
            )
        predictor, own = (
            self.predictor,
            replace(self, rows=tuple(r for r in self.rows if r.method == self.predictor.name)),
        )
        first = {name: own.of(name).predicted for name in names}

        def again(plan: Any) -> Forecast:
            with view.run.arranged(plan):
                return forecast(view.run, view.behaviors, predictor, share=view.share, readings=view.readings)

        return reshape(view, self.contributions(), wish, how, first, own, again)

    def features(
        self,
        tokenizer: Any,
        *,
        encoder: Encoder | None = None,
        layer: int | None = None,
        features: int = 64,
        clusters: int = 8,
        seed: int = 0,
    ) -> FeatureView:
        """Which features of the answers the pairs prefer, asked for or not: in all pairs, and in clusters of them.

        Args:
            tokenizer: of the model.
            encoder: a sparse autoencoder of hidden states, [T, D] -> activations [T, F]. Without one, a token's feature
                is the nearest of some centres of hidden states.
            layer: of the hidden states; None is the middle one.
            features: number of centres.
            clusters: of pairs.
            seed: of centres and clusters.

        Raises:
            ConfigurationError: the run's data are not pairs, or the model does not return hidden states.
        """
        view = self._view()
        with view.run.undisturbed():
            return feature_view(
                view.model, view.run.rows(), tokenizer, encoder=encoder, layer=layer, features=features,
                clusters=clusters, seed=seed,
            )  # fmt: skip

    def _view(self) -> View:
        if self.view is None:
            raise ConfigurationError(
                "This forecast no longer knows its run.", fix="call forecast again, before it trains."
            )
        if fingerprint_of(self.view.model) != self.view.weights:
            raise ConfigurationError(
                "The model has other weights than when it was forecast.",
                cause="it was trained or loaded in between.",
                fix="ask for contributions and plans before training, or build the trainer anew.",
            )
        return self.view


def forecast(
    run: Run,
    behaviors: Sequence[Behavior],
    method: str | Predictor | list[str | Predictor] = "frozen",
    *,
    share: float = 1.0,
    readings: Readings | None = None,
) -> Forecast:
    """Predict what a run would change about behaviors. The run and its model are left as they are.

    The error bar holds the standard error over queries and samples, that of the batches not looked at, the disagreement
    with a predictor of another kind (``warm``), and a share of the prediction that grows with the regime. The noise
    floor is the shift by what the batches do not agree on, half of them against the other half, and the standard error
    over queries and samples.

    Args:
        run: that has not begun.
        behaviors: of its model.
        method: one or several of ``METHODS``, or predictors with settings of their own.
        share: of the run's batches that are differentiated.
        readings: of the same behaviors of the same model, to be used again.

    Raises:
        ConfigurationError: an unknown method, no behaviors, two of the same name, or a run that cannot be followed.
        BehaviorError: a behavior that cannot be measured.
    """
    asked = method if isinstance(method, list | tuple) else [method]
    methods = [_predictor(one) for one in asked]
    _check(behaviors)
    with run.undisturbed():
        view = View(run, list(behaviors), share, readings)
        view.model.train()
        found = [(one, one.predict(view)) for one in methods]
        moving = next((p for _, p in found if p.displacement is not None), None)
        noise = _noise(view) if moving else [float("nan")] * len(behaviors)
        regime, note = regime_of(view, moving) if moving else ("unknown", "")
        rows = [row for one, p in found for row in _rows(view, one, p, noise, regime)]
    caveats = [*(one.caveat for one in methods), note, *_said(rows)]
    follows = next((one for one, p in found if p.scaled), None)
    return Forecast(tuple(rows), tuple(filter(None, caveats)), view, follows)


def _rows(view: View, method: Predictor, found: Prediction, noise: Sequence[float], regime: str) -> list[Shift]:
    others = _others(view, method) if found.scaled else [r.change for r in found.changes]
    rows = []
    facts = zip(view.behaviors, view.readings.means(), found.changes, others, noise, strict=True)
    left_out = (1 - found.cost) ** 0.5 if found.cost < 1 else 0.0  # of a finite population
    for behavior, before, reading, other, batches in facts:
        parts = (
            COVERED * reading.standard_error, FEW * left_out * batches, reading.change - other,
            FROZEN[regime] * reading.change,
        )  # fmt: skip
        bar = sum(part * part for part in parts) ** 0.5
        floor = (batches**2 + (COVERED * reading.standard_error) ** 2) ** 0.5
        linear = reading.change if reading.how == "linear" else float("nan")
        rows.append(
            Shift(behavior.name, method.name, before, reading.change, bar if found.scaled else float("nan"),
                  floor if found.scaled else float("nan"), regime, reading.how, reading.effective, linear, found.cost)
        )  # fmt: skip
    return rows


def _others(view: View, method: Predictor) -> list[float]:
    """What a predictor of another kind says."""
    return [reading.change for reading in (view.frozen if method.name == "warm" else view.warm)]


def _noise(view: View) -> list[float]:
    """The shift by what the batches do not agree on, its scale shared by behaviors of a unit: one may be small by
    chance."""
    found = view.readings.of(view.gradients.noise)
    sizes = []
    for behavior, reading in zip(view.behaviors, found, strict=True):
        like = [r.change for b, r in zip(view.behaviors, found, strict=True) if b.unit == behavior.unit]
        sizes.append(max(abs(reading.change), (sum(change * change for change in like) / len(like)) ** 0.5))
    return sizes


def _said(rows: Sequence[Shift]) -> list[str]:
    below = [row.behavior for row in rows if row.noise_floor == row.noise_floor and not row.above_noise]
    return [f"below the noise floor: {', '.join(dict.fromkeys(below))}"] if below else []


def _predictor(method: str | Predictor) -> Predictor:
    if not isinstance(method, str):
        return method
    if method not in METHODS:
        raise ConfigurationError(f"Unknown method {method!r}.", fix=f"use one or several of {list(METHODS)}.")
    return METHODS[method]


def _check(behaviors: Sequence[Behavior]) -> None:
    names = [behavior.name for behavior in behaviors]
    if not names or len(set(names)) < len(names):
        raise ConfigurationError(f"Behaviors {names}.", fix="pass at least one, each under a name of its own.")
