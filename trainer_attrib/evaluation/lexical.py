"""The lexical baseline: attribution that knows only the words. Often hard to beat, therefore always shown."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from trainer_attrib.errors import MissingExtraError

_SPACE = re.compile(r"\s\s+")


def bm25_scores(queries: Sequence[str], texts: Sequence[str]) -> np.ndarray:
    """BM25 score of every text for every query (Robertson & Zaragoza 2009), float32 [Q, N]; 0 for one without words.

    Raises:
        MissingExtraError: the extra ``search`` is not installed.
    """
    try:
        import bm25s
    except ImportError:
        raise MissingExtraError("bm25s", "search") from None

    def words(of: Sequence[str]) -> Any:
        return bm25s.tokenize(list(of), stopwords=[], return_ids=False, show_progress=False)

    scores_QN, corpus = np.zeros((len(queries), len(texts)), np.float32), words(texts)
    if any(corpus):
        index = bm25s.BM25()
        index.index(corpus, show_progress=False)
        for row_N, query in zip(scores_QN, words(queries), strict=True):
            if query:
                row_N[:] = index.get_scores(query)
    return scores_QN


def tfidf_scores(queries: Sequence[str], texts: Sequence[str], lengths: Sequence[int] = (2, 3, 4)) -> np.ndarray:
    """Cosine of the tf-idf vectors of character n-grams, float32 [Q, N]: attribution without any model.

    Weights are ``count * (ln((1 + N) / (1 + texts with it)) + 1)`` of lower-cased text, as scikit-learn's
    ``TfidfVectorizer(analyzer="char")`` has them; runs of white space are one space. Zero for
    what shares no n-gram with the query.

    Args:
        queries: Q texts; n-grams that no training text has are left out.
        texts: N training texts.
        lengths: of the n-grams, in characters.
    """
    numbers: dict[str, int] = {}
    found = [_grams(text, lengths) for text in texts]
    for grams in found:
        for gram in grams:
            numbers.setdefault(gram, len(numbers))
    text_of = np.repeat(np.arange(len(texts)), [len(grams) for grams in found])
    gram_of = np.array([numbers[gram] for grams in found for gram in grams], np.int64)
    count = np.array([n for grams in found for n in grams.values()], np.float64)
    rarity = np.log((1 + len(texts)) / (1 + np.bincount(gram_of, minlength=len(numbers)))) + 1
    weight = count * rarity[gram_of]
    length = np.sqrt(np.bincount(text_of, weight**2, minlength=len(texts)))
    order = np.argsort(gram_of, kind="stable")  # texts of one n-gram side by side
    begins = np.searchsorted(gram_of[order], np.arange(len(numbers) + 1))
    scores_QN = np.zeros((len(queries), len(texts)))
    for row_N, query in zip(scores_QN, queries, strict=True):
        known = {
            numbers[gram]: n * rarity[numbers[gram]] for gram, n in _grams(query, lengths).items() if gram in numbers
        }
        for gram, own in known.items():
            places = order[begins[gram] : begins[gram + 1]]
            row_N[text_of[places]] += own * weight[places]
        norm = float(np.sqrt(sum(own**2 for own in known.values())))
        row_N /= np.maximum(length, np.finfo(float).tiny) * (norm or 1.0)
    return scores_QN.astype(np.float32)


def _grams(text: str, lengths: Sequence[int]) -> Counter[str]:
    text = _SPACE.sub(" ", text.lower())
    return Counter(text[at : at + n] for n in lengths for at in range(len(text) - n + 1))
