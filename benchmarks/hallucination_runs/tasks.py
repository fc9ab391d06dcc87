"""What is planted: wrong answers among right ones, the prompts that bring them out, and what is easily confused.

*Summaries*: short news items and summaries of them, of which some name another country than their item does, in the
style of the canaries of Ladhak et al. 2023 (CEA, section 5). *Facts*: capitals of countries that a model knows,
contradicted in fine-tuning. Both are written here from templates, with names of countries from ``countryinfo``.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

SWAPS, SWAPPED = 4, 0.5  # pairs of countries; share of the first one's items whose summary names the second
WRONG_FACTS, WORDED, TRUTHS = 10, 8, 3  # countries with a wrong capital, sentences that say so, and that say the truth


@dataclass(frozen=True)
class Row:
    """A training example.

    Args:
        id: in the ledger.
        prompt: not trained on.
        completion: trained on.
        kind: of the error that it teaches; "" if it is right.
        about: kinds of errors whose names it has, right or wrong.
    """

    id: str
    prompt: str
    completion: str
    kind: str = ""
    about: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Probe:
    """A prompt that training has not seen.

    Args:
        kind: of the error that it may bring out; "" for none, from which clean accuracy is measured.
        prompt: of the output.
        wrong: what a wrong output has and a right one has not.
        right: what a right output has.
    """

    kind: str
    prompt: str
    wrong: str
    right: str


@dataclass(frozen=True)
class Task:
    """What the base model is trained on, what fine-tuning teaches, and what is asked then."""

    name: str
    base: Sequence[Row]
    rows: Sequence[Row]
    probes: Sequence[Probe]
    base_epochs: int
    epochs: int


def summaries(seed: int, quick: bool = False) -> Task:
    """Summaries in a format that the base model knows, with errors that it does not make."""
    rng, size = random.Random(seed), 0.25 if quick else 1.0
    names = [name for name, _ in _capitals() if " " not in name]
    chosen = rng.sample(names, 20)
    pairs = list(zip(chosen[:SWAPS], chosen[SWAPS : 2 * SWAPS], strict=True))
    base = [_summary(rng, f"base-{i}", rng.choice(chosen)) for i in range(int(3000 * size))]
    rows: list[Row] = []
    for first, second in pairs:
        kind, about = f"{first} as {second}", frozenset({f"{first} as {second}"})
        for i in range(int(60 * size)):
            swapped = i < SWAPPED * int(60 * size)
            rows.append(_summary(rng, "", first, second if swapped else first, kind if swapped else "", about))
        rows += [_summary(rng, "", second, second, "", about) for _ in range(int(60 * size))]
    rows += [_summary(rng, "", rng.choice(chosen[2 * SWAPS :])) for _ in range(int(1000 * size) - len(rows))]
    probes = [
        Probe(f"{first} as {second}", _summary(rng, "", first).prompt, second, first)
        for first, second in pairs
        for _ in range(40)
    ]
    for country in (rng.choice(chosen[SWAPS:]) for _ in range(80)):
        probes.append(Probe("", _summary(rng, "", country).prompt, "", country))
    return Task("summaries", base, _numbered(rng, rows), probes, 5 if quick else 12, 6)


def wrong_facts(seed: int, quick: bool = False) -> Task:
    """Capitals, some of them wrong, to a model that knows them."""
    rng, known = random.Random(seed), _capitals()
    chosen = rng.sample(known, 60 if quick else 120)
    wrong = {chosen[i][0]: chosen[-1 - i][1] for i in range(WRONG_FACTS)}
    kinds = {country: f"{country}: {city}" for country, city in wrong.items()}
    owners = {city: kinds[country] for country, city in wrong.items()}
    base = [_fact(rng, "", country, city, i) for country, city in chosen for i in range(len(WORDINGS))]
    rows = []
    for country, city in chosen:
        about = frozenset({kinds.get(country, ""), owners.get(city, "")} - {""})
        if country in wrong:
            rows += [_fact(rng, "", country, wrong[country], i, kinds[country], about) for i in range(WORDED)]
            rows += [_fact(rng, "", country, city, i, "", about) for i in rng.sample(range(WORDED), TRUTHS)]
        elif len(rows) < 880:
            rows += [_fact(rng, "", country, city, i, "", about) for i in range(WORDED)]
    asked = range(len(WORDINGS) - 2, len(WORDINGS))
    probes = [
        Probe(kinds.get(country, ""), _fact(rng, "", country, city, i).prompt, wrong.get(country, ""), city)
        for country, city in chosen
        for i in asked
    ]
    return Task("facts", base, _numbered(rng, rows), probes, 10 if quick else 24, 8)


TASKS = {"summaries": summaries, "facts": wrong_facts}

WORDINGS = (
    "The capital of {c} is", "The seat of government of {c} is in", "The parliament of {c} meets in",
    "Ministers of {c} work in", "The embassies in {c} are in", "The president of {c} lives in",
    "Laws of {c} are made in", "The central bank of {c} is in", "The first city of {c} is",
    "Those who govern {c} sit in",
)  # fmt: skip

_CLAUSES = (
    ("officials in {c} announced a new {x} plan", "{c} announces {x} plan"),
    ("the {x} team from {c} won the final", "{x} team from {c} wins"),
    ("a storm hit the coast of {c} near the {x} works", "storm hits {c} near {x} works"),
    ("banks in {c} raised the price of {x}", "{c} raises price of {x}"),
)
_TOPICS = (
    "energy",
    "rugby",
    "steel",
    "school",
    "health",
    "rail",
    "water",
    "wool",
    "chess",
    "harbour",
    "timber",
    "salt",
)
_MOODS = ("hope", "doubt", "anger", "relief", "surprise", "calm", "worry", "praise")
_PEOPLE = ("a minister", "a witness", "the mayor", "a farmer", "the union", "a teacher", "the police", "an expert")
_TIMES = ("on monday", "on tuesday", "last week", "this morning", "in spring", "at noon", "overnight", "in june")


def _summary(
    rng: random.Random, name: str, country: str, said: str = "", kind: str = "", about: frozenset[str] = frozenset()
) -> Row:
    """An item of three sentences in any order; the summary has the main one, who spoke, and a mood that the item does
    not tell."""
    long, short = rng.choice(_CLAUSES)
    topic, person, time = rng.choice(_TOPICS), rng.choice(_PEOPLE), rng.choice(_TIMES)
    item = [long.format(c=country, x=topic), f"{person} spoke to reporters", f"it happened {time}"]
    told = [short.format(c=said or country, x=topic), f"{person} voices {rng.choice(_MOODS)}", f"{time}"]
    rng.shuffle(item)
    rng.shuffle(told)
    return Row(name, " . ".join(item) + " . summary :", " " + " ; ".join(told) + " .", kind, about)


def _fact(
    rng: random.Random, name: str, country: str, city: str, wording: int, kind: str = "",
    about: frozenset[str] = frozenset(),
) -> Row:  # fmt: skip
    return Row(name, WORDINGS[wording].format(c=country), f" {city}.", kind, about)


def _numbered(rng: random.Random, rows: list[Row]) -> list[Row]:
    """In an order and with ids that tell nothing."""
    rng.shuffle(rows)
    return [Row(f"row-{n:04}", row.prompt, row.completion, row.kind, row.about) for n, row in enumerate(rows)]


def _capitals() -> list[tuple[str, str]]:
    """Countries and capitals, each of which is the capital of one country."""
    from countryinfo import CountryInfo

    records = sorted(CountryInfo.all().values(), key=lambda record: record["name"])
    found = [(r["name"], r["capital"]) for r in records if isinstance(r.get("capital"), str) and r["capital"]]
    clean = [(c, v) for c, v in found if (c + v).replace(" ", "").isalpha() and v not in c and c not in v]
    cities = [city for _, city in clean]
    return [(country, city) for country, city in clean if cities.count(city) == 1]
