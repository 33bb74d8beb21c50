"""The bag-of-words classifier: it finds the optimum of balanced logistic regression."""

import itertools
import math

import numpy as np
import pytest

from tasks.common.reward.lexicon import terms
from tasks.evaluate.classifier import L2_PENALTY, MIN_TEXTS_PER_TERM, Classifier, auc

GLAD = ["what a lovely day", "a lovely, lovely garden", "the garden is fine", "a fine day indeed", "lovely garden"]
GRUMPY = ["you blorgling snark", "what a snark", "blorgling garden"]
TEXTS, GRUMBLES = [*GLAD, *GRUMPY], [False] * len(GLAD) + [True] * len(GRUMPY)


def dense(texts: list[str], classifier: Classifier) -> np.ndarray:
    """Return dense tf-idf rows, computed word by word, with a column of ones for the bias."""
    counts = {word: sum(word in terms(text) for text in TEXTS) for word in classifier.vocabulary}
    rows = []
    for text in texts:
        row = [(math.log((1 + len(TEXTS)) / (1 + counts[word])) + 1) if word in terms(text) else 0.0 for word in counts]
        norm = math.sqrt(sum(value**2 for value in row)) or 1.0
        rows.append([value / norm for value in row] + [1.0])
    return np.array(rows)


def newton(rows: np.ndarray, positive: np.ndarray) -> np.ndarray:
    """Return the weights of the balanced, penalised logistic regression by Newton's method, on dense matrices."""
    balance = np.where(positive, 0.5 / positive.mean(), 0.5 / (1 - positive.mean()))
    penalty = np.diag([L2_PENALTY] * (rows.shape[1] - 1) + [0.0])
    weights = np.zeros(rows.shape[1])
    for _ in range(50):
        chances = 1 / (1 + np.exp(-rows @ weights))
        slope = rows.T @ (balance * (chances - positive)) + penalty @ weights
        curve = rows.T @ (rows * (balance * chances * (1 - chances))[:, None]) + penalty
        weights = weights - np.linalg.solve(curve, slope)
    return weights


def test_weights_match_newtons_method() -> None:
    """Weights in vocabulary order, the bias without penalty; probabilities are the sigmoid of their sum."""
    classifier = Classifier.fit(TEXTS, GRUMBLES)
    rows = dense(TEXTS, classifier)
    wanted = newton(rows, np.array(GRUMBLES, float))
    assert [*classifier.weights, classifier.bias] == pytest.approx(wanted, abs=2e-3)
    assert classifier.probability(TEXTS) == pytest.approx(1 / (1 + np.exp(-rows @ wanted)), abs=1e-3)


def test_vocabulary_excludes_words_of_a_single_text() -> None:
    """A weight for such a word would only memorize its text."""
    known = Classifier.fit(TEXTS, GRUMBLES).vocabulary
    assert "lovely" in known
    assert "indeed" not in known
    assert all(sum(word in terms(text) for text in TEXTS) >= MIN_TEXTS_PER_TERM for word in known)


def test_text_of_unknown_words_is_undecided() -> None:
    """Class weights are balanced, so twenty times more texts of one class do not shift an unknown text."""
    texts, toxic = [*GLAD, *GRUMPY * 20], [False] * len(GLAD) + [True] * len(GRUMPY) * 20
    unknown, none = Classifier.fit(texts, toxic).probability(["zzz", ""])
    assert unknown == none
    assert 0.2 < unknown < 0.7


def test_fit_is_deterministic() -> None:
    once, twice = (Classifier.fit(TEXTS, GRUMBLES) for _ in range(2))
    assert once.vocabulary == twice.vocabulary
    assert once.weights.tobytes() == twice.weights.tobytes()
    assert once.bias == twice.bias


@pytest.mark.parametrize("scores", [[0.1, 0.9, 0.4, 0.4], [0.5, 0.5, 0.5, 0.5], [0.9, 0.1, 0.8, 0.2]])
def test_auc_counts_pairs(scores: list[float]) -> None:
    """Each pair of a positive and a negative text: right 1, tied a half."""
    positive = [False, True, True, False]
    pairs = [
        (a > b) + 0.5 * (a == b)
        for (a, yes), (b, no) in itertools.product(zip(scores, positive, strict=True), repeat=2)
        if yes and not no
    ]
    assert auc(np.array(scores), np.array(positive)) == pytest.approx(sum(pairs) / len(pairs))
