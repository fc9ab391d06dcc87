"""Questions that need the model itself, asked from a page: which examples made it say this, what would a plan do."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from trainer_attrib.analysis.analyzer import Analyzer
from trainer_attrib.analysis.behavior import Behavior
from trainer_attrib.analysis.forecasting.forecast import Forecast
from trainer_attrib.analysis.keeping import keep
from trainer_attrib.analysis.training_state import fingerprint_of
from trainer_attrib.errors import ConfigurationError
from trainer_attrib.explorer.catalog import Catalog

ROWS = ("trackstar", "fisher", "grad_cos", "grad_dot", "tracin")
"""Recipes that need nothing but what was recorded."""
LONGEST = 20_000  # characters of a question


@dataclass(frozen=True)
class Work:
    """What a question takes: its wording, under which its answer is kept, and how to get it."""

    title: str
    asked: Mapping[str, Any]
    run: Callable[[], str]


class Desk(Protocol):
    """Answers questions of one kind about one ledger."""

    kind: str

    def told(self) -> dict[str, Any]:
        """What the page needs for its form."""
        ...

    def work(self, fields: Mapping[str, str]) -> Work:
        """A filled-in form.

        Raises:
            ConfigurationError: it cannot be asked.
        """
        ...


class InfluenceDesk:
    """Which training examples made the model prefer a completion?

    Args:
        catalog: of the ledger.
        analyzer: of the same ledger, and of the model.
        tokenizer: of the model.
    """

    kind = "influence"

    def __init__(self, catalog: Catalog, analyzer: Analyzer, tokenizer: Any) -> None:
        self._catalog, self._analyzer, self._tokenizer = catalog, analyzer, tokenizer
        self._model = fingerprint_of(analyzer.model)

    def told(self) -> dict[str, Any]:
        """Recipes and stages to choose from."""
        return {"recipes": list(ROWS), "stages": [stage.name for stage in self._analyzer.lineage]}

    def work(self, fields: Mapping[str, str]) -> Work:
        """``prompt``, ``completion``, and perhaps ``alternative``, ``recipe``, ``stage``.

        Raises:
            ConfigurationError: no completion, a text that is too long, or a recipe or stage that is not offered.
        """
        told = self.told()
        prompt, completion, other = (_text(fields, name) for name in ("prompt", "completion", "alternative"))
        recipe, stage = fields.get("recipe") or told["recipes"][0], fields.get("stage") or None
        if not completion:
            raise ConfigurationError("There is no completion to ask about.", fix="fill in what the model says.")
        if recipe not in told["recipes"] or (stage and stage not in told["stages"]):
            raise ConfigurationError(f"recipe={recipe!r}, stage={stage!r}.", fix=f"choose among {told}.")
        title = f"{prompt}{completion}" + (f" rather than{other}" if other else "")
        asked = {"influence": {"prompt": prompt, "completion": completion, "alternative": other, "recipe": recipe,
                               "stage": stage}, "model": self._model, "state": self._catalog.state}  # fmt: skip

        def run() -> str:
            if other:
                behavior = Behavior.contrast("prefers", [prompt], [completion], [other], self._tokenizer)
            else:
                behavior = Behavior.completion("says", [prompt], [completion], self._tokenizer)
            found = self._analyzer.influence([behavior], [stage] if stage else None, recipe)
            return keep(self._catalog.ledger, found, title=title, asked=asked)

        return Work(title, asked, run)


class ForecastDesk:
    """What would the run do if its data were changed?

    Args:
        catalog: of the ledger that answers are kept in.
        forecast: of a run that has not begun.
    """

    kind = "reshape"

    def __init__(self, catalog: Catalog, forecast: Forecast) -> None:
        self._catalog, self._forecast = catalog, forecast

    def told(self) -> dict[str, Any]:
        """Behaviors and ways to choose from."""
        return {"behaviors": list(dict.fromkeys(row.behavior for row in self._forecast.rows)),
                "ways": ["reweight", "drop", "flip", "offset"]}  # fmt: skip

    def work(self, fields: Mapping[str, str]) -> Work:
        """``behavior``, the largest change that it may have as ``below``, and ``how``.

        Raises:
            ConfigurationError: a behavior or a way that is not offered, or no number.
        """
        told, behavior, how = self.told(), fields.get("behavior", ""), fields.get("how") or "reweight"
        if behavior not in told["behaviors"] or how not in told["ways"]:
            raise ConfigurationError(f"behavior={behavior!r}, how={how!r}.", fix=f"choose among {told}.")
        try:
            below = float(fields.get("below", "0"))
        except ValueError:
            raise ConfigurationError(f"below={fields['below']!r} is no number.", fix="fill in a change.") from None
        title = f"{behavior} kept below {below:g} ({how})"
        before = self._forecast.of(behavior).predicted
        asked = {"reshape": {"behavior": behavior, "below": below, "how": how, "before": before},
                 "state": self._catalog.state}  # fmt: skip

        def run() -> str:
            found = self._forecast.reshape(keep_below={behavior: below}, how=how)
            return keep(self._catalog.ledger, found, title=title, asked=asked)

        return Work(title, asked, run)


def _text(fields: Mapping[str, str], name: str) -> str:
    text = fields.get(name, "")
    if len(text) > LONGEST:
        raise ConfigurationError(f"{name} has {len(text):,} characters.", fix=f"ask about at most {LONGEST:,}.")
    return text
