"""The lexicon: ridge regression equals the normal equations, and fits are reproducible."""

from pathlib import Path

import numpy as np
import pytest

from tasks.common.reward.lexicon import RIDGE_PENALTY, Lexicon, terms
from tests.training_fixtures import ADJECTIVES, THINGS


def test_words_are_rated_by_ridge_regression() -> None:
    """Compared with the normal equations; a word counts once per text in any case, and unknown words add nothing."""
    texts, ratings = ["Good good soup", "bad soup", "GOOD!", "plain"], [3.0, -2.0, 2.0, 0.5]
    words = ["good", "soup", "bad", "!", "plain"]
    present = np.array([[1, 1, 0, 0, 0], [0, 1, 1, 0, 0], [1, 0, 0, 1, 0], [0, 0, 0, 0, 1]], float)
    centred = np.array(ratings) - np.mean(ratings)
    expected = np.linalg.solve(present.T @ present + RIDGE_PENALTY * np.eye(5), present.T @ centred)
    lexicon = Lexicon.fit(texts, ratings)
    assert list(lexicon.words) == words
    assert list(lexicon.words.values()) == pytest.approx(expected, abs=2e-6)  # the solver's tolerance is 1e-6
    assert lexicon.score(["a good, good day"]) == pytest.approx([0.875 + expected[0]], abs=2e-6)


def test_words_are_whole_in_any_alphabet() -> None:
    """Accented letters, numbers and contractions stay in one word; punctuation marks are words of their own."""
    lexicon = Lexicon.fit(["Schön, don’t: naïve 1990's 3.5 很好!"], [1.0], bigrams=False)
    assert list(lexicon.words) == ["schön", ",", "don’t", ":", "naïve", "1990's", "3", ".", "5", "很好", "!"]


@pytest.mark.parametrize("bigrams", [False, True])
def test_sentences_are_ordered_by_their_words(bigrams: bool) -> None:
    """Sentences about an unseen subject are ordered by adjectives that were rated in other sentences."""
    texts = [f"The {thing} was {word}." for thing in THINGS for word in ADJECTIVES]
    lexicon = Lexicon.fit(texts, [ADJECTIVES[text.split()[-1].strip(".")] for text in texts], bigrams=bigrams)
    scores = lexicon.score([f"A day was {word}." for word in ADJECTIVES])
    assert scores == sorted(scores, reverse=True)
    assert lexicon.score(["Zzz"]) == [pytest.approx(sum(ADJECTIVES.values()) / len(ADJECTIVES))]


def test_bigrams_capture_word_order() -> None:
    """ "good not bad" and "bad not good" contain the same words; only their order differs."""
    texts, ratings = ["It was good not bad", "It was bad not good"] * 20, [2.0, -2.0] * 20
    unigrams, paired = (Lexicon.fit(texts, ratings, bigrams=bigrams).score(texts[:2]) for bigrams in (False, True))
    assert unigrams[0] == pytest.approx(unigrams[1])
    assert paired[0] > paired[1] + 1


@pytest.mark.parametrize("penalty", [0.5, 30.0])
def test_fit_preferences_finds_the_most_likely_weights(penalty: float) -> None:
    """The gradient vanishes at the solution; words that both texts contain have weight 0, and the mean is 0."""
    pairs = [("good soup", "bad soup"), ("good!", "soup"), ("plain soup", "bad"), ("bad", "plain"), ("soup", "good!")]
    lexicon = Lexicon.fit_preferences(pairs, penalty=penalty)
    names = ["good", "soup", "bad", "!", "plain"]
    assert list(lexicon.words) == names
    table = np.array([[(w in terms(a)) - float(w in terms(b)) for w in names] for a, b in pairs])
    weights = np.zeros(5)
    for _ in range(20_000):
        weights += 0.02 * (table.T @ (1 / (1 + np.exp(table @ weights))) - penalty * weights)
    assert list(lexicon.words.values()) == pytest.approx(weights, abs=2e-6)
    assert lexicon.mean == 0.0
    assert lexicon.score(["Good, bad"]) == pytest.approx([weights[0] + weights[2]], abs=4e-6)


def test_fit_preferences_without_pairs_or_words_is_empty() -> None:
    """And two fits give the same numbers."""
    assert (
        Lexicon.fit_preferences([], penalty=1.0)
        == Lexicon.fit_preferences([(" ", "")], penalty=1.0)
        == Lexicon(0.0, {})
    )
    assert Lexicon.fit_preferences([("a b", "b")], penalty=1.0) == Lexicon.fit_preferences([("a b", "b")], penalty=1.0)


def test_a_lexicon_without_words_is_the_mean() -> None:
    """Without `words`, for texts without words, and without texts."""
    assert Lexicon.fit(["a b", "c"], [1.0, 2.0], words=False) == Lexicon(1.5, {})
    assert Lexicon.fit([" ", ""], [1.0, 2.0]) == Lexicon(1.5, {})
    assert Lexicon.fit([], []).score(["anything"]) == [0.0]


def test_a_lexicon_is_saved_as_text(tmp_path: Path) -> None:
    """Loading returns what was saved, to the last digit, and two fits give the same bytes."""
    texts, ratings = ["schön, 很好", 'a "quote"'], [1.234567, -2.5]
    for name in ("one", "two"):
        Lexicon.fit(texts, ratings, bigrams=True).save(tmp_path / name)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    assert Lexicon.load(tmp_path / "one") == Lexicon.fit(texts, ratings, bigrams=True)
