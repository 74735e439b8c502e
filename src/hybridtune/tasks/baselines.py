"""Predictors that no tuning is needed for: what a tuned model has to beat."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np


def of_texts(
    texts: tuple[list[str], list[str]], target: np.ndarray, features: tuple[np.ndarray, np.ndarray] | None
) -> list[tuple[str, str, np.ndarray]]:
    """Learns from train what is predicted for test.

    Args:
        texts: of train and of test.
        target: class ids of train, or 0 and 1 for every label.
        features: frozen ones of train and of test.

    Returns:
        Name, how it was made, and predictions on test, of each baseline.
    """
    from sklearn.dummy import DummyClassifier
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    train, test = texts
    words = _words()
    cases: list[tuple[str, str, Any, Any, Any]] = [
        (
            "majority class",
            "the most frequent label of train",
            DummyClassifier(),
            np.zeros((len(train), 1)),
            np.zeros((len(test), 1)),
        ),
        (
            "bag of words",
            "tf-idf of words and pairs of words, logistic regression (C = 10)",
            LogisticRegression(C=10, max_iter=1000),
            words.fit_transform(train),
            words.transform(test),
        ),
    ]
    if features is not None:
        scaler = StandardScaler().fit(features[0])
        cases.append(
            (
                "frozen features",
                "mean of the last hidden states of the model as it was given, logistic regression (C = 1)",
                LogisticRegression(max_iter=1000),
                *map(scaler.transform, features),
            )
        )
    return [(name, detail, _fit_and_predict(model, x, target, y)) for name, detail, model, x, y in cases]


def likest(train: Sequence[str], test: Sequence[str]) -> list[int]:
    """For each text of test the number of the text of train whose words (tf-idf) are most like its own."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.neighbors import NearestNeighbors

    words = TfidfVectorizer(token_pattern=r"(?u)\w+|[^\w\s]", sublinear_tf=True)
    near = NearestNeighbors(n_neighbors=1, metric="cosine").fit(words.fit_transform(train))
    found: list[int] = near.kneighbors(words.transform(test), return_distance=False)[:, 0].tolist()
    return found


def _fit_and_predict(model: Any, x: Any, target: np.ndarray, y: Any) -> np.ndarray:
    """Of several labels each has a model of its own; one that stands on all rows of train, or on none, needs none."""
    if target.ndim == 1:
        return np.asarray(model.fit(x, target).predict(y))
    columns = [
        np.full(y.shape[0], label[0]) if (label == label[0]).all() else model.fit(x, label).predict(y)
        for label in target.T
    ]
    return np.stack(columns, axis=1)


def numbers_of_texts(
    texts: tuple[list[str], list[str]], target: np.ndarray, features: tuple[np.ndarray, np.ndarray] | None
) -> list[tuple[str, str, np.ndarray]]:
    """Learns from train what numbers are predicted for test.

    Args:
        texts: of train and of test.
        target: numbers of train, [rows, numbers].
        features: frozen ones of train and of test.

    Returns:
        Name, how it was made, and predictions on test, of each baseline.
    """
    from sklearn.dummy import DummyRegressor
    from sklearn.linear_model import Ridge
    from sklearn.preprocessing import StandardScaler

    train, test = texts
    words = _words()
    blank = (np.zeros((len(train), 1)), np.zeros((len(test), 1)))
    cases: list[tuple[str, str, Any, Any, Any]] = [
        ("mean", "the mean of train", DummyRegressor(), *blank),
        (
            "bag of words",
            "tf-idf of words and pairs of words, ridge regression (alpha = 1)",
            Ridge(),
            words.fit_transform(train),
            words.transform(test),
        ),
    ]
    if features is not None:
        scaler = StandardScaler().fit(features[0])
        detail = "mean of the last hidden states of the model as it was given, ridge regression (alpha = 100)"
        cases.append(("frozen features", detail, Ridge(alpha=100), *map(scaler.transform, features)))
    return [
        (name, detail, np.asarray(model.fit(x, target).predict(y)).reshape(len(test), -1))
        for name, detail, model, x, y in cases
    ]


def _words() -> Any:
    from sklearn.feature_extraction.text import TfidfVectorizer

    return TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, token_pattern=r"(?u)\w+|[^\w\s]")
