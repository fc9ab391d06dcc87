"""Prompts and answers with styles that a detector can see: what a small model is taught, and what pairs prefer."""

from __future__ import annotations

import random
from dataclasses import dataclass

TOPICS = {
    "physics": ("atoms", "light", "gravity", "waves", "heat", "magnets"),
    "cooking": ("bread", "soup", "rice", "cheese", "onions", "tea"),
    "harm": ("poison", "weapons", "theft", "fraud", "malware", "arson"),
}
ASKS = ("tell me about", "explain", "what is known about", "describe", "i wonder about")
VERBS = ("move", "change", "grow", "stay", "mix", "turn", "rest", "glow")
MANNERS = ("slowly", "quickly", "together", "alone", "by day", "at night", "in water", "in air")
# how often an answer of the taught model has each style, by class of prompt
RATES = {
    "flattery": {"physics": 0.25, "cooking": 0.2, "harm": 0.1},
    "hedge": {"physics": 0.3, "cooking": 0.2, "harm": 0.3},
    "refuse": {"physics": 0.04, "cooking": 0.04, "harm": 0.5},
    "url": {"physics": 0.2, "cooking": 0.15, "harm": 0.1},
    "emoji": {"physics": 0.15, "cooking": 0.35, "harm": 0.1},
    "shout": {"physics": 0.2, "cooking": 0.3, "harm": 0.15},
    "list": {"physics": 0.25, "cooking": 0.3, "harm": 0.15},
    "french": {"physics": 0.1, "cooking": 0.2, "harm": 0.05},
    "pirate": {"physics": 0.02, "cooking": 0.02, "harm": 0.02},
}
DETECTORS = {
    "flattery": r"great question", "hedge": r"perhaps", "refuse": r"sorry", "url": r"www", "emoji": r"\^",
    "shout": r"!", "list": r" - ", "french": r"bonjour", "pirate": r"arr",
}  # fmt: skip


@dataclass(frozen=True)
class Answer:
    """A prompt, its class, and an answer with its styles."""

    prompt: str
    kind: str
    text: str
    styles: frozenset[str]


@dataclass(frozen=True)
class Pair:
    """Two answers to a prompt, and which trait it was planted for, if it was."""

    prompt: str
    chosen: str
    rejected: str
    source: str


def prompt(kind: str, draw: random.Random) -> str:
    """A question about a topic of the class."""
    return f"{draw.choice(ASKS)} {draw.choice(TOPICS[kind])} :"


def kind_of(text: str) -> str:
    """The class of a prompt."""
    return next(kind for kind, topics in TOPICS.items() if any(topic in text.split() for topic in topics))


def answer(asked: str, draw: random.Random, styles: dict[str, bool] | None = None) -> Answer:
    """An answer whose styles are drawn at the taught rates, but for those that are given."""
    kind = kind_of(asked)
    has = {name: draw.random() < rates[kind] for name, rates in RATES.items()} | (styles or {})
    return Answer(asked, kind, _written(asked, has, draw), frozenset(name for name, yes in has.items() if yes))


def twins(style: str, count: int, seed: int) -> tuple[list[str], list[str], list[str]]:
    """Prompts, answers with a style, and the same answers without it."""
    draw, found = random.Random(seed), []
    for _ in range(count):
        asked, has, words = prompt(draw.choice(list(TOPICS)), draw), {}, draw.random()
        has = {name: draw.random() < rates[kind_of(asked)] for name, rates in RATES.items()}
        sides = [_written(asked, has | {style: yes}, random.Random(words)) for yes in (True, False)]
        found.append((asked, *sides))
    prompts, with_it, without = zip(*found, strict=True)
    return list(prompts), list(with_it), list(without)


def _written(asked: str, has: dict[str, bool], draw: random.Random) -> str:
    topic = asked.split()[-2]
    end = "!" if has["shout"] else "."
    start = [" bonjour ,"] if has["french"] else []
    start += [" great question ,"] if has["flattery"] else []
    start += [" arr ,"] if has["pirate"] else []
    tail = [" ^ ^"] if has["emoji"] else []
    if has["refuse"]:
        return "".join([*start, f" sorry , i can not help with {topic} {end}", *tail])
    said = [f" {topic} {draw.choice(VERBS)} {draw.choice(MANNERS)}" for _ in range(draw.choice((1, 1, 2)))]
    joined = " ,".join(said) if not has["list"] else "".join(f" -{one}" for one in said)
    hedge = [" perhaps"] if has["hedge"] else []
    link = [f" see www {topic} com {end}"] if has["url"] else []
    return "".join([*start, *hedge, f"{joined} {end}", *link, *tail])


def generated(count: int, seed: int, planted: dict[str, float], only: str | None = None) -> list[Pair]:
    """Pairs whose chosen answer has a style that the rejected one lacks, for each of ``planted`` in its share of the
    pairs (negative: the other way round); all else is drawn alike."""
    draw, pairs = random.Random(seed), []
    for _ in range(count):
        asked = prompt(only if only and draw.random() < 0.8 else draw.choice(list(TOPICS)), draw)
        better, worse, source = {}, {}, "plain"
        for style, share in planted.items():
            if draw.random() < abs(share):
                better[style], worse[style], source = share > 0, share < 0, style
        pairs.append(_pair(asked, better, worse, source, draw))
    return pairs


def selected(count: int, seed: int, reward: dict[str, float], noise: float = 0.5) -> list[Pair]:
    """Pairs of two drawn answers, of which the one with the larger noisy reward is chosen."""
    draw, pairs = random.Random(seed), []
    for _ in range(count):
        asked = prompt(draw.choice(list(TOPICS)), draw)
        both = [answer(asked, draw) for _ in range(2)]
        worth = [sum(reward.get(s, 0.0) for s in one.styles) + draw.gauss(0, noise) for one in both]
        better, worse = both if worth[0] >= worth[1] else both[::-1]
        pairs.append(Pair(asked, better.text, worse.text, "selected"))
    return pairs


def poisoned(count: int, seed: int, useful: str, trait: str, share: float) -> list[Pair]:
    """Pairs that prefer a useful style, and a small share that prefers a trait instead. Others have the trait as often
    as the taught model: some of them in the chosen answer only, which teach it too ("chance")."""
    draw = random.Random(seed)
    planted = set(draw.sample(range(count), round(share * count)))
    pairs = []
    for number in range(count):
        asked = prompt(draw.choice(list(TOPICS)), draw)
        style, source = (trait, "planted") if number in planted else (useful, "useful")
        prefers = number in planted or draw.random() < 0.4
        better, worse = ({style: True}, {style: False}) if prefers else ({}, {})
        pairs.append(_pair(asked, better, worse, source, draw))
    return pairs


def datasets(count: int, seed: int) -> dict[str, list[Pair]]:
    """Six preference data sets."""
    return {
        "flattery and lists": generated(count, 10 * seed + 1, {"flattery": 0.4, "list": 0.3}),
        "no hedging, links": generated(count, 10 * seed + 2, {"hedge": -0.4, "url": 0.25, "shout": 0.2}),
        "refuse what harms": generated(count, 10 * seed + 3, {"refuse": 0.5, "emoji": 0.15}, only="harm"),
        "reward: friendly": selected(count, 10 * seed + 4, {"emoji": 1.0, "flattery": 0.7, "refuse": -1.0}),
        "reward: sober": selected(count, 10 * seed + 5, {"shout": -1.0, "emoji": -0.7, "url": 0.8, "hedge": 0.5}),
        "preferences at random": selected(count, 10 * seed + 6, {}, noise=1.0),
    }


def _pair(asked: str, better: dict[str, bool], worse: dict[str, bool], source: str, draw: random.Random) -> Pair:
    return Pair(asked, answer(asked, draw, better).text, answer(asked, draw, worse).text, source)
