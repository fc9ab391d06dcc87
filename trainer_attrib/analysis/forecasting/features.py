"""What preference pairs prefer that nobody asked about: features that lean to one side in some cluster of pairs.

Pairs are clustered by what is in them, whichever side it is on, and tested for the side: a cluster is not made by what
it is tested for (Goodfire 2026, "Anatomy of post-training", arXiv 2606.12360, appendix B.1).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor, nn

from trainer_attrib.analysis.behavior import evaluating
from trainer_attrib.analysis.forecasting.run import TrainingRow
from trainer_attrib.analysis.results import Result
from trainer_attrib.analysis.tables import aligned, bars_of, require_matplotlib, shortened
from trainer_attrib.analysis.text import IGNORED, TextPair, encode_pair
from trainer_attrib.errors import ConfigurationError
from trainer_attrib.numerics.clustering import false_discovery_rates, spherical_clusters, welch, z_values
from trainer_attrib.report.blocks import Bar, Bars, Block, Grid, Notes

Encoder = Callable[[Tensor], Tensor]
"""Hidden states of tokens [T, D] -> activations of features [T, F], at least 0, as a sparse autoencoder gives them."""
FIRES, BELIEVED, FEWEST, SAMPLED = 0.01, 0.05, 10, 20_000
"""Share of an answer's tokens from which on it has a feature; false discovery rate up to which a lean is listed; pairs
that a cluster has at least; tokens from which features are made where no encoder is given."""


@dataclass(frozen=True)
class FeatureLean:
    """A feature that chosen answers have oftener than rejected ones, or seldomer, in a cluster of pairs.

    ``lean`` is the share of pairs with it in the chosen answer alone minus that with it in the rejected one alone,
    minus the same outside of the cluster (for the cluster "all", minus nothing). ``halves`` is the smaller of the two
    leans in the two halves of the pairs, which have the same sign.
    """

    cluster: str
    pairs: int
    feature: int
    tokens: str
    lean: float
    halves: float
    z: float
    false_discovery_rate: float
    example: str


@dataclass(frozen=True, repr=False)
class FeatureView(Result):
    """Features that lean to one side, strongest first, and which pair is in which cluster."""

    rows: tuple[FeatureLean, ...]
    clusters: tuple[int, ...]
    caveats: tuple[str, ...] = ()

    def to_table(self) -> pa.Table:
        """Columns cluster, pairs, feature, tokens, lean, halves, z, false_discovery_rate, example."""
        return pa.Table.from_pylist([asdict(row) for row in self.rows])

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {"rows": [asdict(row) for row in self.rows], "caveats": list(self.caveats)}

    def blocks(self) -> list[Block]:
        """Bars, the table, the caveats."""
        bars = [Bar(f"{r.cluster}: {shortened(r.tokens, 40)}", "lean", r.lean) for r in self.rows[:30]]
        note = "Positive: what chosen answers have and rejected ones do not, which training makes likelier."
        columns = ("cluster", "pairs", "feature", "tokens", "lean", "weaker half", "z", "false discoveries", "example")
        return [
            Bars("What the pairs prefer", bars, note=note),
            Grid("Features", columns, [tuple(asdict(row).values()) for row in self.rows]),
            Notes("What to keep in mind", self.caveats),
        ]

    def plot(self) -> Any:
        """A matplotlib figure: the strongest leans. Needs the extra ``plot``."""
        rows = self.rows[:20][::-1]
        figure, axis = require_matplotlib().subplots(figsize=(7, 1 + 0.3 * len(rows)), layout="tight")
        labels = [f"{r.cluster} {r.feature}: {shortened(r.tokens, 30)}" for r in rows]
        bars_of(axis, labels, [r.lean for r in rows])
        axis.set_xlabel("lean to the chosen answer")
        return figure

    def __repr__(self) -> str:
        cells = [
            (r.cluster, f"{r.pairs}", f"{r.lean:+.3f}", f"{r.z:+.1f}", shortened(r.tokens, 40), r.example)
            for r in self.rows[:30]
        ]
        return aligned(("cluster", "pairs", "lean", "z", "tokens", "example"), cells, self.caveats)


def feature_view(
    model: nn.Module,
    rows: Sequence[TrainingRow],
    tokenizer: Any,
    *,
    encoder: Encoder | None = None,
    layer: int | None = None,
    features: int = 64,
    clusters: int = 8,
    seed: int = 0,
) -> FeatureView:
    """See :meth:`~trainer_attrib.analysis.forecasting.forecast.Forecast.features`."""
    if any(row.rejected is None for row in rows) or len(rows) < 2 * FEWEST:
        raise ConfigurationError(
            f"Features are tested on at least {2 * FEWEST} pairs of a chosen and a rejected answer, not on {len(rows)} "
            "rows of these data.",
            fix="forecast a preference trainer, with more data.",
        )
    generator = torch.Generator().manual_seed(seed)
    sides = [
        [encode_pair(tokenizer, row.prompt, side or "") for row, side in zip(rows, column, strict=True)]
        for column in ([row.chosen for row in rows], [row.rejected for row in rows])
    ]
    with evaluating(model):
        states = [token_states(model, items, layer) for items in sides]
    encode = encoder or _codebook(torch.cat(states[0] + states[1]), features, generator)
    frequencies = [torch.stack([(encode(s) > 0).double().mean(0).cpu() for s in side]) for side in states]
    chosen_NM, rejected_NM = frequencies
    assigned_N, _ = spherical_clusters(chosen_NM + rejected_NM, clusters, generator)
    signed_NM = (chosen_NM > FIRES).double() - (rejected_NM > FIRES).double()
    tokens = _told_by(sides, states, encode, tokenizer)
    found = _leans(signed_NM, assigned_N, tokens, rows)
    caveats = (
        f"listed are leans with a false discovery rate of at most {BELIEVED:.0%} and one sign in both halves",
        "a lean of the data is not yet a change of the model: ask for its forecast with a detector for it",
    )
    return FeatureView(tuple(found), tuple(assigned_N.tolist()), caveats)


def token_states(model: nn.Module, items: Sequence[TextPair], layer: int | None = None) -> list[Tensor]:
    """Hidden states of the tokens that count of each item, float32 [T, D] each on the CPU.

    Raises:
        ConfigurationError: the model does not return its hidden states.
    """
    device, found = next(model.parameters()).device, []
    for item in items:
        with torch.no_grad():
            output: Any = model(input_ids=torch.tensor([item.tokens], device=device), output_hidden_states=True)
        states = getattr(output, "hidden_states", None)
        if states is None:
            raise ConfigurationError(
                f"{type(model).__name__} returned no hidden states.",
                fix="leave out what is computed from representations (method 'projection', features).",
            )
        counted = torch.tensor([label != IGNORED for label in item.labels])
        found.append(states[len(states) // 2 if layer is None else layer][0].float().cpu()[counted])
    return found


def _codebook(states_TD: Tensor, count: int, generator: torch.Generator) -> Encoder:
    """Features without an autoencoder: a token has the one feature whose centre is nearest by direction."""
    mean_D = states_TD.mean(0)
    few = torch.randperm(len(states_TD), generator=generator)[:SAMPLED]
    _, centres_FD = spherical_clusters(states_TD[few] - mean_D, count, generator)

    def encode(some_TD: Tensor) -> Tensor:
        nearest = ((some_TD - mean_D) @ centres_FD.T).argmax(1)
        return torch.nn.functional.one_hot(nearest, len(centres_FD)).float()

    return encode


def _told_by(sides: list[list[TextPair]], states: list[list[Tensor]], encode: Encoder, tokenizer: Any) -> list[str]:
    """The tokens on which each feature fires most."""
    counts: list[Counter[int]] = []
    for items, side in zip(sides, states, strict=True):
        for item, some in zip(items, side, strict=True):
            fires_TF = encode(some) > 0
            counts = counts or [Counter() for _ in range(fires_TF.shape[1])]
            tokens = [token for token, label in zip(item.tokens, item.labels, strict=True) if label != IGNORED]
            for place, feature in fires_TF.nonzero().tolist():
                counts[feature][tokens[place]] += 1
    return [" ".join(repr(tokenizer.decode([token])) for token, _ in count.most_common(4)) for count in counts]


def _leans(signed_NM: Tensor, assigned_N: Tensor, tokens: list[str], rows: Sequence[TrainingRow]) -> list[FeatureLean]:
    even_N = torch.arange(len(signed_NM)) % 2 == 0
    groups = [("all", torch.ones(len(signed_NM), dtype=torch.bool))]
    groups += [(str(k), assigned_N == k) for k in assigned_N.unique().tolist()]
    candidates: list[tuple[str, Tensor, int, float, float, float]] = []
    for name, inside_N in groups:
        if min(int((inside_N & even_N).sum()), int((inside_N & ~even_N).sum())) < FEWEST // 2:
            continue
        z_M, lean_M = _test(signed_NM, inside_N)
        halves_2M = torch.stack([_test(signed_NM[half], inside_N[half])[1] for half in (even_N, ~even_N)])
        for feature in range(signed_NM.shape[1]):
            one, other = halves_2M[:, feature].tolist()
            weaker = min(abs(one), abs(other)) if one * other > 0 else 0.0
            candidates.append((name, inside_N, feature, float(lean_M[feature]), weaker, float(z_M[feature])))
    rates = false_discovery_rates(torch.tensor([c[-1] for c in candidates], dtype=torch.float64)).tolist()
    found = []
    for (name, inside_N, feature, lean, weaker, z), rate in zip(candidates, rates, strict=True):
        if rate <= BELIEVED and weaker > 0:
            shows = inside_N & (signed_NM[:, feature] * lean > 0)
            place = int((shows if shows.any() else inside_N).nonzero()[0, 0])
            found.append(
                FeatureLean(
                    name, int(inside_N.sum()), feature, tokens[feature], lean, weaker, z, rate, rows[place].text
                )
            )
    return sorted(found, key=lambda row: -row.halves)


def _test(signed_NM: Tensor, inside_N: Tensor) -> tuple[Tensor, Tensor]:
    """z values and leans, inside against outside; against 0 where everything is inside."""
    if inside_N.all():
        return z_values(signed_NM), signed_NM.mean(0)
    inside_NM, outside_NM = signed_NM[inside_N], signed_NM[~inside_N]
    return welch(inside_NM, outside_NM), inside_NM.mean(0) - outside_NM.mean(0)
