"""Passages that state facts about countries, and questions about them in words of their own.

A passage is several sentences about several countries, as text is: it states the fact that is asked for among others. A
fact is one value of a relation (capital, currency, ...) of a country and is stated in three passages, in three
wordings. About one country in four there are also questions with answers, from which the model learns what a question
is; facts about other countries are asked for, in the same words. So there are three kinds of distractors: passages
about the same country, about the same relation, and in the words of the question. Data come from ``countryinfo``.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from typing import Any

SENTENCES = 6  # of a passage
EXEMPLARS = 4  # one country in so many is asked about in training
WORDINGS = {
    "capital": (
        "The capital of {c} is {v}.",
        "{v} is the seat of government of {c}.",
        "The government of {c} meets in {v}.",
    ),
    "demonym": (
        "A person from {c} is called {v}.",
        "People of {c} are known as {v}.",
        "The word for someone from {c} is {v}.",
    ),
    "currency": (
        "The currency code of {c} is {v}.",
        "Prices in {c} are marked {v}.",
        "Banks in {c} pay out {v}.",
    ),
    "domain": (
        "Web sites from {c} end in {v}.",
        "The internet domain of {c} is {v}.",
        "Addresses in {c} have the ending {v}.",
    ),
    "calling code": (
        "Dial {v} to call {c}.",
        "The calling code of {c} is {v}.",
        "Telephone numbers in {c} begin with {v}.",
    ),
    "neighbor": (
        "{c} shares a border with {v}.",
        "A neighbor of {c} is {v}.",
        "From {c} one can walk to {v}.",
    ),
}
QUESTIONS = {
    "capital": "In which city does one find the parliament of {c}?",
    "demonym": "How does one name somebody who comes from {c}?",
    "currency": "With which money does one pay in {c}?",
    "domain": "Which letters close the web address of a site in {c}?",
    "calling code": "Which number reaches a phone in {c}?",
    "neighbor": "Which country lies next to {c}?",
}
PROMPT = "{q} It is"


@dataclass(frozen=True)
class Fact:
    """One value of a relation of a country."""

    country: str
    relation: str
    value: str


@dataclass(frozen=True)
class Passage:
    """A training example and the facts that it states."""

    id: str
    text: str
    facts: frozenset[Fact]


@dataclass(frozen=True)
class Query:
    """A question about a fact: the log-probability of ``completion`` after ``prompt``."""

    fact: Fact
    prompt: str
    completion: str


def facts_of_countries(countries: int, seed: int) -> list[Fact]:
    """Every fact about some countries, drawn by the seed."""
    from countryinfo import CountryInfo

    records = sorted(CountryInfo.all().values(), key=lambda record: record["name"])
    names = {record["ISO"]["alpha3"]: record["name"] for record in records if record.get("ISO")}
    found = [facts for record in records if len(facts := _facts(record, names)) >= len(WORDINGS) - 1]
    return [fact for facts in random.Random(seed).sample(found, min(countries, len(found))) for fact in facts]


def passages(facts: list[Fact], seed: int) -> list[Passage]:
    """Every fact in its three wordings, and those of the countries asked about as questions too, each kind spread over
    passages of its own at random; no passage says a thing twice."""
    rng, found = random.Random(seed), []
    for wording in range(4):
        stated = facts if wording < 3 else [fact for fact in facts if fact.country in asked(facts)]
        order = rng.sample(stated, len(stated))
        for at in range(0, len(order), SENTENCES):
            said = order[at : at + SENTENCES]
            found.append((" ".join(_sentence(fact, wording) for fact in said), frozenset(said)))
    return [Passage(f"passage-{number:04}", text, said) for number, (text, said) in enumerate(found)]


def asked(facts: list[Fact]) -> set[str]:
    """The countries about which training asks questions."""
    return set(list(dict.fromkeys(fact.country for fact in facts))[::EXEMPLARS])


def queries(facts: list[Fact], count: int, seed: int) -> list[Query]:
    """Questions about some facts whose value no other country has for this relation, about countries that training asks
    nothing about."""
    owners: dict[tuple[str, str], int] = {}
    for fact in facts:
        owners[fact.relation, fact.value] = owners.get((fact.relation, fact.value), 0) + 1
    trained = asked(facts)
    unique = [f for f in facts if owners[f.relation, f.value] == 1 and f.country not in trained]
    chosen = random.Random(seed).sample(unique, min(count, len(unique)))
    return [Query(fact, _prompt(fact), f" {fact.value}") for fact in chosen]


def _prompt(fact: Fact) -> str:
    return PROMPT.format(q=QUESTIONS[fact.relation].format(c=fact.country))


def _sentence(fact: Fact, wording: int) -> str:
    if wording == len(WORDINGS[fact.relation]):
        return f"{_prompt(fact)} {fact.value}."
    return WORDINGS[fact.relation][wording].format(c=fact.country, v=fact.value)


def _facts(record: dict[str, Any], names: dict[str, str]) -> list[Fact]:
    country = record["name"]
    first = {key: (record.get(key) or [None])[0] for key in ("currencies", "tld", "callingCodes", "borders")}
    values = {
        "capital": record.get("capital") if isinstance(record.get("capital"), str) else None,
        "demonym": re.split("[,/]", record.get("demonym") or "")[0],
        "currency": first["currencies"],
        "domain": first["tld"],
        "calling code": first["callingCodes"],
        "neighbor": names.get(first["borders"] or ""),
    }
    usable = {
        relation: value for relation, value in values.items() if value and value.isprintable() and value not in country
    }
    if re.search("[(,/]", country):
        return []
    return [Fact(country, relation, value) for relation, value in usable.items()]
