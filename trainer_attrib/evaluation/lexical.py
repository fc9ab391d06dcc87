"""The lexical baseline: attribution that knows only the words. Often hard to beat, therefore always shown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from trainer_attrib.errors import MissingExtraError


def bm25_scores(queries: Sequence[str], texts: Sequence[str]) -> np.ndarray:
    """BM25 score of every text for every query (Robertson & Zaragoza 2009), float32 [Q, N].

    Raises:
        MissingExtraError: the extra ``search`` is not installed.
    """
    try:
        import bm25s
    except ImportError:
        raise MissingExtraError("bm25s", "search") from None
    index = bm25s.BM25()
    index.index(bm25s.tokenize(list(texts), stopwords=[], show_progress=False), show_progress=False)
    words: Any = bm25s.tokenize(list(queries), stopwords=[], return_ids=False, show_progress=False)
    return np.stack([index.get_scores(query) for query in words]).astype(np.float32)
