from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from trainer_attrib.evaluation.lexical import tfidf_scores
from trainer_attrib.evaluation.retrieval import random_share, share_in_top


def test_share_in_top_counts_the_best():
    scores = np.array([[0.9, 0.8, 0.1, 0.0], [0.0, 0.1, 0.8, 0.9]])
    found = share_in_top(scores, np.array([True, True, False, False]), 2)
    assert found.share == 0.5
    assert found.standard_error == pytest.approx(0.5)


def test_ties_do_not_favour_any_position():
    """A baseline whose ties fell to the relevant examples would look better than it is."""
    relevant = np.arange(100) < 10
    share = share_in_top(np.zeros((400, 100)), relevant, 10).share
    assert share == pytest.approx(0.1, abs=0.02)
    assert random_share(relevant, 10, 400).share == share


def test_bm25_finds_the_text_with_the_words():
    lexical = pytest.importorskip("bm25s") and pytest.importorskip("trainer_attrib.evaluation.lexical")
    texts = ["the capital of France is Paris", "the capital of Japan is Tokyo", "bees make honey"]
    scores = lexical.bm25_scores(["honey from bees", "Tokyo in Japan", "unknownword"], texts)
    assert scores.shape == (3, 3)
    assert scores[:2].argmax(1).tolist() == [2, 1]
    assert not scores[2].any()


def test_bm25_of_nothing_is_nothing():
    """An empty completion is a query without words, and must not end an evaluation."""
    lexical = pytest.importorskip("bm25s") and pytest.importorskip("trainer_attrib.evaluation.lexical")
    scores = lexical.bm25_scores(["", "bees make"], ["bees make honey", "", "!"])
    assert not scores[0].any()
    assert (scores[1] > 0).tolist() == [True, False, False]
    assert lexical.bm25_scores(["a"], ["", "!"]).tolist() == [[0, 0]]
    assert lexical.bm25_scores([], ["bees"]).shape == (0, 1)


def test_tfidf_weighs_what_is_rare():
    """One-character n-grams by hand: of 2 texts, "a" is in both (weight 1), "b" and "c" in one (ln(3/2) + 1)."""
    rare = np.log(3 / 2) + 1
    scores = tfidf_scores(["b", "A", "x", ""], ["aab", "ac"], lengths=(1,))
    first, second = np.sqrt(4 + rare**2), np.sqrt(1 + rare**2)
    expected = [[rare / first, 0], [2 / first, 1 / second], [0, 0], [0, 0]]
    np.testing.assert_allclose(scores, expected, rtol=1e-6)
    assert scores.dtype == np.float32


def test_tfidf_of_a_text_with_itself_is_one_and_order_does_not_matter():
    texts = ["the capital of France is Paris", "the capital of Japan is Tokyo", "bees make honey", "", "a"]
    scores = tfidf_scores(texts, texts)
    np.testing.assert_allclose(np.diag(scores), [1, 1, 1, 0, 0], rtol=1e-6)
    np.testing.assert_allclose(scores, scores.T, atol=1e-7)
    np.testing.assert_allclose(tfidf_scores(texts, texts[::-1]), scores[:, ::-1], atol=1e-7)
    assert scores[0, 1] > scores[0, 2] > 0
    assert tfidf_scores(["a \n\t b"], ["a b"])[0, 0] == pytest.approx(1)  # runs of white space are one


def test_a_missing_extra_says_what_to_install():
    code = (
        "import sys; sys.modules['bm25s'] = None\n"
        "from trainer_attrib.evaluation.lexical import bm25_scores\n"
        "try: bm25_scores(['a'], ['a'])\n"
        "except ImportError as error: print(error)"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "pip install 'trainer-attrib[search]'" in printed
