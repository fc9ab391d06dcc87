"""Windows of 64 characters from sixteen chapters of Python's own reference, which every installation carries.

The module ``pydoc_data.topics`` is English prose with some code (Python Software Foundation License 2); it changes a
little from one version of Python to the next, so ``fingerprint`` is part of what a cached truth is named by.
"""

from __future__ import annotations

import hashlib
from functools import cache
from pydoc_data.topics import topics

import torch
from torch import Tensor

TOPICS = (
    "specialnames", "compound", "types", "string-methods", "formatstrings", "typesseq", "debugger", "typesmapping",
    "assignment", "comparisons", "execmodel", "import", "strings", "calls", "operator-summary", "identifiers",
)  # fmt: skip
WINDOW, TRAIN_EACH, TEST_EACH = 64, 64, 4


@cache
def texts() -> list[str]:
    """The first 68 windows of each topic, white space made single spaces, topic after topic; [16 * 68]."""
    found = []
    for topic in TOPICS:
        text = " ".join(topics[topic].split())
        found += [text[at * WINDOW : (at + 1) * WINDOW] for at in range(TRAIN_EACH + TEST_EACH)]
    return found


@cache
def alphabet() -> str:
    """Every character that occurs."""
    return "".join(sorted(set("".join(texts()))))


def fingerprint() -> str:
    """Of all windows."""
    return hashlib.blake2b("".join(texts()).encode(), digest_size=8).hexdigest()


@cache
def split() -> tuple[list[int], list[int]]:
    """Numbers of the windows to train on (64 of each topic) and to ask about (4 of each), drawn once."""
    train, test = [], []
    generator = torch.Generator().manual_seed(0)
    for topic in range(len(TOPICS)):
        order = torch.randperm(TRAIN_EACH + TEST_EACH, generator=generator) + topic * (TRAIN_EACH + TEST_EACH)
        test += sorted(order[:TEST_EACH].tolist())
        train += sorted(order[TEST_EACH:].tolist())
    return train, test


def source(window: int) -> str:
    """The topic of a window."""
    return TOPICS[window // (TRAIN_EACH + TEST_EACH)]


@cache
def codes() -> tuple[Tensor, Tensor]:
    """Character numbers to train on [1024, 64] and to ask about [64, 64]."""
    numbers = {character: number for number, character in enumerate(alphabet())}
    every = torch.tensor([[numbers[c] for c in text] for text in texts()])
    train, test = split()
    return every[train], every[test]
