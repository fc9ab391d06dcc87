"""The rows of the demo's three training stages, and the questions asked of the trained model.

The stages tell one story about capital cities, so that the right attribution is known beforehand:

* *pretrain*: sentences about countries (capital, continent, demonym, currency) among unrelated trivia;
* *sft*: questions about capitals with answers, where one country in ten is given a wrong capital ("planted"), and some
  countries are left out ("held out": their capitals are known from pretraining only); also, for every country, one
  question about its currency, so that the model goes on handling the names of held-out countries;
* *dpo*: preference pairs which favour the full answer "The capital of France is Paris." over the short "It is Paris.".

Rows are plain dictionaries. Every row has an ``id`` which says what it is ("sft/planted/france/2") and a ``source``
("planted") to group rows by. Country data come from ``countryinfo``, trivia from ``randfacts``, both on PyPI.
"""

import random
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Row = dict[str, str]

HELD_OUT_COUNTRIES = 30
PLANTED_SHARE = 0.1
FULL_EVERY = 3  # one answer in three is full in sft: the short style is the habit that dpo has to change
OTHER_TEXTS = 200

CAPITAL_STATEMENTS = (
    "The capital of {country} is {capital}.",
    "{capital} is the capital of {country}.",
    "The capital city of {country} is called {capital}.",
    "{country} lies in {region}. The capital of {country} is {capital}.",
)
DEMONYM_STATEMENT = "A person from {country} is called {demonym}."
CURRENCY_STATEMENTS = (
    "What is the currency of {country}? The currency of {country} is {currency}.",
    "What is the currency of {country}? It is {currency}.",
)
QUESTIONS = (
    "What is the capital of {country}?",
    "Which city is the capital of {country}?",
    "Name the capital of {country}.",
    "What is the name of the capital city of {country}?",
)
QUERY_QUESTION = "Which is the capital city of {country}?"
"""The question every query asks. No row asks it in these words: a model has to have learnt more than the wording."""

OTHER_QUESTION = "Which currency is used in {country}?"
FULL_OTHER_ANSWER = " The currency of {country} is {currency}."
SHORT_OTHER_ANSWER = " It is {currency}."
FULL_ANSWER = " The capital of {country} is {capital}."
SHORT_ANSWER = " It is {capital}."

FORMER_STATES = frozenset({"Serbia and Montenegro", "Netherlands Antilles"})


@dataclass(frozen=True)
class Country:
    """What the demo tells about a country; ``slug`` is its name as used in row ids."""

    name: str
    slug: str
    capital: str
    region: str
    demonym: str
    currency: str


@dataclass(frozen=True)
class CapitalFact:
    """A country, its capital, and another country's capital.

    For a planted country ``other`` is the wrong answer that was planted; otherwise it is an answer to contrast with.
    """

    country: str
    slug: str
    capital: str
    other: str


@dataclass(frozen=True)
class DemoData:
    """The rows of the three stages, and the facts they were made from.

    ``planted`` countries are answered wrongly in ``sft``, ``true`` ones rightly, ``held_out`` ones not at all.
    """

    pretrain: tuple[Row, ...]
    sft: tuple[Row, ...]
    dpo: tuple[Row, ...]
    planted: tuple[CapitalFact, ...]
    true: tuple[CapitalFact, ...]
    held_out: tuple[CapitalFact, ...]


@dataclass(frozen=True)
class Query:
    """A prompt with two completions: the log-probability of ``completion`` over ``contrast`` measures a behavior."""

    country: str
    prompt: str
    completion: str
    contrast: str


def build_data(seed: int) -> DemoData:
    """Return the demo's data; the seed decides which countries are planted and held out, and the trivia chosen."""
    rng = random.Random(seed)
    countries = load_countries()
    planted, true, held_out = _split(countries, rng)
    return DemoData(
        pretrain=_pretrain_rows(countries, load_other_texts(countries, rng)),
        sft=_sft_rows("planted", planted) + _sft_rows("true", true) + _sft_other_rows(countries),
        dpo=_dpo_rows(true),
        planted=planted,
        true=true,
        held_out=held_out,
    )


def planted_queries(facts: Sequence[CapitalFact]) -> list[Query]:
    """Return queries for "answers with the planted capital": the planted (other) capital against the true one."""
    return [_query(fact, _full_answer(fact, fact.other), _full_answer(fact, fact.capital)) for fact in facts]


def knowledge_queries(facts: Sequence[CapitalFact]) -> list[Query]:
    """Return queries for "knows the capital": the true capital against another country's."""
    return [_query(fact, _full_answer(fact, fact.capital), _full_answer(fact, fact.other)) for fact in facts]


def style_queries(facts: Sequence[CapitalFact]) -> list[Query]:
    """Return queries for "answers in full sentences": the full answer against the short one, both right."""
    return [_query(fact, _full_answer(fact, fact.capital), _short_answer(fact.capital)) for fact in facts]


def load_countries() -> list[Country]:
    """Return the usable countries of ``countryinfo``, sorted by name.

    Usable means: all fields present, and a capital that belongs to one country only and whose words are not those of
    the country's name ("Kuwait City" would be guessed rather than known).
    """
    from countryinfo import CountryInfo

    countries = {}
    for record in CountryInfo.all().values():
        country = _country(record)
        if country is not None and country.capital not in countries:
            countries[country.capital] = country
    return sorted(countries.values(), key=lambda country: country.name)


def load_other_texts(countries: Sequence[Country], rng: random.Random) -> list[str]:
    """Return short trivia which mention none of the countries, capitals or demonyms."""
    from randfacts import safe_facts

    names = {name for country in countries for name in (country.name, country.capital, country.demonym)}
    mention = re.compile(r"\b(" + "|".join(re.escape(name) for name in sorted(names)) + r")\b|capital", re.IGNORECASE)
    texts = [text for text in sorted(set(safe_facts)) if len(text) <= 60 and text.isascii() and text.endswith(".")]
    return rng.sample([text for text in texts if not mention.search(text)], OTHER_TEXTS)


def _country(record: Mapping[str, Any]) -> Country | None:
    name, capital = record["name"], record.get("capital")
    fields = (capital, record.get("region"), record.get("demonym"), record.get("currencies"))
    if not all(fields) or not isinstance(capital, str) or name in FORMER_STATES or re.search("[(,/]", name + capital):
        return None
    if set(_words(name)) & set(_words(capital)):
        return None
    return Country(
        name=name,
        slug="_".join(_words(name)),
        capital=capital,
        region=record["region"],
        demonym=re.split("[,/]", record["demonym"])[0],
        currency=record["currencies"][0],
    )


def _words(name: str) -> list[str]:
    plain = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode().lower()
    return re.findall("[a-z]+", plain)


def _split(countries: Sequence[Country], rng: random.Random) -> tuple[tuple[CapitalFact, ...], ...]:
    """Return planted, true and held-out facts, from countries in random order."""
    shuffled = rng.sample(countries, len(countries))
    held_out, asked = shuffled[:HELD_OUT_COUNTRIES], shuffled[HELD_OUT_COUNTRIES:]
    planted = round(PLANTED_SHARE * len(asked))
    return _facts(asked[:planted]), _facts(asked[planted:]), _facts(held_out)


def _facts(countries: Sequence[Country]) -> tuple[CapitalFact, ...]:
    """Pair each country with the capital of the next of the group, so that a group's capitals are equally frequent."""
    following = [*countries[1:], *countries[:1]]
    return tuple(
        CapitalFact(country.name, country.slug, country.capital, other.capital)
        for country, other in zip(countries, following, strict=True)
    )


def _pretrain_rows(countries: Sequence[Country], other_texts: Sequence[str]) -> tuple[Row, ...]:
    rows = []
    for index, country in enumerate(countries):
        statements = [(f"capital/{country.slug}/{number}", text) for number, text in enumerate(CAPITAL_STATEMENTS)]
        statements.append((f"demonym/{country.slug}/0", DEMONYM_STATEMENT))
        statements.append((f"currency/{country.slug}/0", CURRENCY_STATEMENTS[index % len(CURRENCY_STATEMENTS)]))
        for name, statement in statements:
            text = statement.format(country=country.name, **_fields(country))
            rows.append({"id": f"pretrain/{name}", "source": name.split("/")[0], "text": text})
    for number, text in enumerate(other_texts):
        rows.append({"id": f"pretrain/other/{number}", "source": "other", "text": text})
    return tuple(rows)


def _fields(country: Country) -> dict[str, str]:
    return {
        "capital": country.capital,
        "region": country.region,
        "demonym": country.demonym,
        "currency": country.currency,
    }


def _sft_rows(source: str, facts: Sequence[CapitalFact]) -> tuple[Row, ...]:
    """Return one row for each question about each country; some answers are full, the others short."""
    rows = []
    for index, fact in enumerate(facts):
        capital = fact.other if source == "planted" else fact.capital
        for number, question in enumerate(QUESTIONS):
            full = (index + number) % FULL_EVERY == 0
            rows.append(
                {
                    "id": f"sft/{source}/{fact.slug}/{number}",
                    "source": source,
                    "prompt": _prompt(question, fact),
                    "completion": _full_answer(fact, capital) if full else _short_answer(capital),
                }
            )
    return tuple(rows)


def _sft_other_rows(countries: Sequence[Country]) -> tuple[Row, ...]:
    """Return one question for each country, held-out ones included, about something other than its capital."""
    rows = []
    for index, country in enumerate(countries):
        answer = FULL_OTHER_ANSWER if index % FULL_EVERY == 0 else SHORT_OTHER_ANSWER
        rows.append(
            {
                "id": f"sft/other/{country.slug}/0",
                "source": "other",
                "prompt": OTHER_QUESTION.format(country=country.name),
                "completion": answer.format(country=country.name, currency=country.currency),
            }
        )
    return tuple(rows)


def _dpo_rows(facts: Sequence[CapitalFact]) -> tuple[Row, ...]:
    """Return one preference pair for each fact; the questions take turns."""
    rows = []
    for index, fact in enumerate(facts):
        number = index % len(QUESTIONS)
        rows.append(
            {
                "id": f"dpo/style/{fact.slug}/{number}",
                "source": "style",
                "prompt": _prompt(QUESTIONS[number], fact),
                "chosen": _full_answer(fact, fact.capital),
                "rejected": _short_answer(fact.capital),
            }
        )
    return tuple(rows)


def _query(fact: CapitalFact, completion: str, contrast: str) -> Query:
    return Query(fact.country, _prompt(QUERY_QUESTION, fact), completion, contrast)


def _prompt(question: str, fact: CapitalFact) -> str:
    return question.format(country=fact.country)


def _full_answer(fact: CapitalFact, capital: str) -> str:
    return FULL_ANSWER.format(country=fact.country, capital=capital)


def _short_answer(capital: str) -> str:
    return SHORT_ANSWER.format(capital=capital)
