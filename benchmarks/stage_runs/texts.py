"""Four kinds of text that every installation has, in one small alphabet."""

from __future__ import annotations

import bisect
import fnmatch
import heapq
import inspect
import random
import textwrap
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from trainer_attrib_integrations.demo.facts import load_countries

ALPHABET = "\n abcdefghijklmnopqrstuvwxyz0123456789.,:;?'()[]=+-*_#"
WINDOW = 24  # characters
HELD_OUT = 0.15  # the end of each text


@cache
def texts() -> dict[str, str]:
    """Name of the domain -> its text: this repository's licence, Python's own sources (which differ a little from one
    version to the next), sums, and questions about countries."""
    draw = random.Random(0)
    sums = [(draw.randrange(100), draw.randrange(100)) for _ in range(3000)]
    countries = load_countries()
    draw.shuffle(countries)
    found = {
        "licence": (Path(__file__).parents[2] / "LICENSE").read_text(),
        "python": "".join(inspect.getsource(module) for module in (textwrap, heapq, bisect, fnmatch)),
        "sums": "".join(f"{a}+{b}={a + b}\n" for a, b in sums),
        "questions": "".join(
            f"what is the capital of {c.name}? {c.capital}.\nwhere is {c.name}? in {c.region}.\n" for c in countries
        ),
    }
    return {name: text.lower() for name, text in found.items()}


@cache
def windows(domain: str) -> tuple[Tensor, Tensor]:
    """Windows of a domain's text as character numbers [N, 24]: overlapping ones to train on, others to ask about."""
    text = texts()[domain]
    codes = torch.tensor([ALPHABET.index(c) for c in text if c in ALPHABET])
    split = round(len(codes) * (1 - HELD_OUT))
    return codes[:split].unfold(0, WINDOW, 8), codes[split:].unfold(0, WINDOW, WINDOW)
